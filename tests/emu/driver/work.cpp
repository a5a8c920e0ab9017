// work.cpp: enqueuing, and doing. See state.h.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "state.h"

namespace emu {

thread_local Device *current_device = nullptr;

Driver &driver() {
    static Driver *const one =
        new Driver; // never destroyed: programs call the driver until their last breath
    return *one;
}

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string dim(const Dim &v) {
    return "[" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + "]";
}

const char *direction(const Command &c) {
    if (c.to.memory == nullptr) {
        return c.from.memory == nullptr ? "HtoH" : "DtoH";
    }
    return c.from.memory == nullptr ? "HtoD" : c.from.memory == c.to.memory ? "DtoD" : "peer";
}

std::string name_of(const Command &c) {
    const std::string bytes = std::to_string(c.bytes * c.rows) + " bytes";
    return c.kind == Command::Fill ? "fill of " + bytes : std::string(direction(c)) + " copy of " + bytes;
}

void log_command(const char *event, const Command &c, int device, int stream, int graph) {
    if (!logging()) {
        return;
    }
    std::string fields = "\"device\":" + std::to_string(device) + ",\"stream\":" + std::to_string(stream) +
                         ",\"graph\":" + std::to_string(graph);
    switch (c.kind) {
    case Command::Launch:
        fields += ",\"what\":\"launch\",\"kernel\":" + json(c.kernel->name) + ",\"grid\":" + dim(c.grid) +
                  ",\"block\":" + dim(c.block) + ",\"shared\":" + std::to_string(c.shared_bytes) +
                  (c.programmatic ? ",\"programmatic\":true" : "");
        break;
    case Command::Copy:
        fields += std::string(",\"what\":\"copy\",\"kind\":\"") + direction(c) +
                  "\",\"bytes\":" + std::to_string(c.bytes * c.rows) +
                  ",\"src\":" + std::to_string(c.from.address) + ",\"dst\":" + std::to_string(c.to.address) +
                  ",\"rows\":" + std::to_string(c.rows);
        break;
    case Command::Fill:
        fields += ",\"what\":\"fill\",\"bytes\":" + std::to_string(c.bytes * c.rows) +
                  ",\"dst\":" + std::to_string(c.to.address);
        break;
    case Command::Record:
        fields += ",\"what\":\"record\"";
        break;
    case Command::Wait:
        fields += ",\"what\":\"wait\"";
        break;
    case Command::Graph:
        fields += ",\"what\":\"graph\",\"nodes\":" + std::to_string(c.graph->nodes.size());
        break;
    }
    log_line(event, fields);
}

} // namespace

// ---- enqueuing
// ----------------------------------------------------------------------------------------------

CUresult Driver::enqueue(Stream *stream, Command command, std::vector<std::uint64_t> after) {
    if (stream->capture) {
        Graph &graph = *stream->capture;
        if (graph.invalid) {
            return CAPTURE_INVALIDATED;
        }
        log_command("capture", command, stream->device->index, stream->number, 0);
        const std::size_t own = stream->captured;
        const bool overlaps =
            command.programmatic && own != NO_NODE && graph.nodes[own].command.kind == Command::Launch;
        graph.nodes.push_back(Node{std::move(command), stream->tail, overlaps ? own : NO_NODE});
        stream->captured = graph.nodes.size() - 1;
        stream->tail = {stream->captured};
        return SUCCESS;
    }
    if (pending.empty()) {
        history.forget(host);
    }
    stream->clock.join(host);
    stream->begin.join(host);
    const auto comes_after = [&](const Stream &other) {
        stream->clock.join(other.clock);
        stream->begin.join(other.clock);
        if (!done(other.last)) {
            after.push_back(other.last);
        }
    };
    // The legacy default stream comes after all blocking streams of its device, and they after it.
    if (stream->legacy) {
        for (const Stream *other : streams) {
            if (other->device == stream->device && other->blocking) {
                comes_after(*other);
            }
        }
    } else if (stream->blocking) {
        comes_after(stream->device->legacy);
    }
    log_command("call", command, stream->device->index, stream->number, 0);
    if (command.kind == Command::Launch && !command.programmatic) {
        stream->begin = stream->clock;
    }
    stream->last = ++works;
    stream->clock.add(stream->number, works);
    pending[works] = stream;
    const Command::Kind kind = command.kind;
    stream->queue.push_back(Work{works, stream->device, stream->number, std::move(after), std::move(command),
                                 stream->clock, stream->begin});
    if (kind == Command::Copy || kind == Command::Fill || kind == Command::Graph) {
        stream->begin = stream->clock;
    }
    if (settings.seed % 3 == 2) {
        finish(works);
        return stream->device->sticky;
    }
    return SUCCESS;
}

void Driver::occasion() {
    if (settings.seed % 3 == 1 && !pending.empty() && random.below(4) == 0) {
        // The head of some stream that has work.
        std::vector<Stream *> busy;
        for (Stream *s : streams) {
            if (!s->queue.empty()) {
                busy.push_back(s);
            }
        }
        if (!busy.empty()) {
            Stream *s = busy[random.below(static_cast<unsigned>(busy.size()))];
            finish(s->queue.front().number);
        }
    }
}

// ---- doing
// --------------------------------------------------------------------------------------------------

// Changing the protection of memory costs; so it stays open from the first launch to the end of a round of
// work.
struct Round {
    Driver &d;
    explicit Round(Driver &driver) : d(driver) { d.rounds++; }
    ~Round() {
        if (--d.rounds == 0) {
            for (Memory *memory : d.opened) {
                memory->close();
            }
            d.opened.clear();
        }
    }
};

void Driver::finish(std::uint64_t work) {
    const Round round(*this);
    while (!done(work)) {
        Stream *stream = pending[work];
        // What stands before it in its stream, then it; each with what it names.
        const std::vector<std::uint64_t> needs = stream->queue.front().after;
        for (const std::uint64_t need : needs) {
            finish(need);
        }
        if (!done(work)) {
            perform_front(stream);
        }
    }
}

void Driver::finish_stream(Stream *stream) {
    const Round round(*this);
    finish(stream->last);
    if (stream->legacy) { // waiting for it is waiting for the blocking ones too
        for (Stream *other : std::vector<Stream *>(streams.begin(), streams.end())) {
            if (other->device == stream->device && other->blocking) {
                finish(other->last);
                waited(other->clock);
            }
        }
    }
}

void Driver::finish_device(Device *device) {
    const Round round(*this);
    std::vector<Stream *> all{&device->legacy};
    for (Stream *s : streams) {
        if (s->device == device) {
            all.push_back(s);
        }
    }
    // In a drawn order: only stream order and events may count.
    for (std::size_t i = all.size(); i > 1; i--) {
        std::swap(all[i - 1], all[random.below(static_cast<unsigned>(i))]);
    }
    for (Stream *s : all) {
        finish(s->last);
    }
    for (const Stream *s : all) {
        waited(s->clock);
    }
}

void Driver::advance(std::uint64_t work) {
    if (done(work)) {
        return;
    }
    const Round round(*this);
    // Down to something that waits for nothing.
    for (;;) {
        Stream *stream = pending[work];
        const Work &front = stream->queue.front();
        const auto need =
            std::find_if(front.after.begin(), front.after.end(), [&](std::uint64_t n) { return !done(n); });
        if (need == front.after.end()) {
            perform_front(stream);
            return;
        }
        work = *need;
    }
}

void Driver::perform_front(Stream *stream) {
    Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    pending.erase(work.number);
    if (work.device->sticky == SUCCESS) {
        const Clock *begin = work.command.programmatic ? &work.begin : nullptr;
        perform(work.device, work.command, 0, Turn{stream->number, work.number, &work.clock, begin});
    }
}

void Driver::perform(Device *device, const Command &c, int graph, const Turn &turn) {
    log_command("run", c, device->index, turn.stream, graph);
    switch (c.kind) {
    case Command::Launch:
        perform_launch(device, c, turn);
        return;
    case Command::Copy:
        for (const Lent &l : lent) {
            if (l.work == turn.work && !unchanged(l)) {
                return;
            }
        }
        if (!trace(device, c, turn)) {
            return;
        }
        for (std::size_t row = 0; row < c.rows; row++) {
            const std::uintptr_t from = c.from.address + row * c.from.pitch,
                                 to = c.to.address + row * c.to.pitch;
            const void *source = c.staged                   ? c.staged->data() + row * c.bytes
                                 : c.from.memory != nullptr ? c.from.memory->alias(from)
                                                            : reinterpret_cast<const void *>(from);
            void *target = c.to.memory != nullptr ? c.to.memory->alias(to) : reinterpret_cast<void *>(to);
            std::memmove(target, source, c.bytes);
            if (c.to.memory != nullptr && c.from.memory != nullptr) {
                c.to.memory->carry_written(to, *c.from.memory, from, c.bytes);
            } else if (c.to.memory != nullptr) {
                c.to.memory->mark_written(to, c.bytes);
            }
        }
        return;
    case Command::Fill:
        if (!trace(device, c, turn)) {
            return;
        }
        for (std::size_t row = 0; row < c.rows; row++) {
            unsigned char *target = c.to.memory->alias(c.to.address + row * c.to.pitch);
            for (std::size_t i = 0; i < c.bytes; i += c.unit) {
                std::memcpy(target + i, &c.value, c.unit);
            }
            c.to.memory->mark_written(c.to.address + row * c.to.pitch, c.bytes);
        }
        return;
    case Command::Record:
        c.stamp->done = true;
        c.stamp->seconds = now();
        return;
    case Command::Wait:
        return;
    case Command::Graph: {
        // Nodes in some order that their dependencies allow.
        const auto &nodes = c.graph->nodes;
        std::vector<std::size_t> missing(nodes.size()), ready;
        for (std::size_t i = 0; i < nodes.size(); i++) {
            missing[i] = nodes[i].after.size();
            if (missing[i] == 0) {
                ready.push_back(i);
            }
        }
        while (!ready.empty() && device->sticky == SUCCESS) {
            const std::size_t at = random.below(static_cast<unsigned>(ready.size()));
            const std::size_t node = ready[at];
            ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(at));
            perform(device, nodes[node].command, c.graph->number,
                    Turn{turn.stream, turn.work, turn.clock, nullptr, &nodes, node});
            for (std::size_t i = node + 1; i < nodes.size(); i++) {
                missing[i] -=
                    static_cast<std::size_t>(std::count(nodes[i].after.begin(), nodes[i].after.end(), node));
                if (missing[i] == 0 && std::count(nodes[i].after.begin(), nodes[i].after.end(), node) != 0) {
                    ready.push_back(i);
                }
            }
        }
        return;
    }
    }
}

Executor &Driver::engine() {
    if (!executor) {
        executor = std::make_unique<Executor>();
    }
    return *executor;
}

bool Driver::trace(Device *device, const Command &c, const Turn &turn) {
    if (!settings.races) {
        return true;
    }
    const std::vector<Unordered> unordered = history.unordered(turn);
    const std::uint32_t epoch = ++engine().epoch;
    const std::string what = name_of(c) + " (stream " + std::to_string(turn.stream) + ")";
    history.add(turn, epoch, epoch, what);
    for (const Place *place : {&c.from, &c.to}) {
        for (std::size_t row = 0; place->memory != nullptr && row < c.rows; row++) {
            const std::string conflict =
                trace_range(*place->memory, place->address + row * place->pitch, c.bytes, place == &c.to, epoch,
                            unordered);
            if (!conflict.empty()) {
                fail(device, LAUNCH_FAILED,
                     "emulated device: race between launches: " + what + " " + conflict + "\n    work " +
                         std::to_string(turn.work) + ", seed " + std::to_string(settings.seed) + "\n");
                log_line("fault", "\"kind\":\"race between launches\",\"what\":" + json(what));
                return false;
            }
        }
    }
    return true;
}

void Driver::perform_launch(Device *device, const Command &c, const Turn &turn) {
    const std::uint64_t number = ++launches;
    if (const CUresult code = planted_launch_failure(c.kernel->name, device->index)) {
        fail(device, code, std::string("emulated device: planted failure of ") + c.kernel->name + "\n");
        return;
    }
    std::vector<Memory *> reach{&device->memory}, beyond;
    for (const auto &other : devices) {
        if (other.get() != device) {
            (device->peers.count(other.get()) != 0 ? reach : beyond).push_back(&other->memory);
        }
    }
    const emu::Launch launch{c.kernel,      c.packed.data(), c.grid, c.block, c.shared_bytes,
                             settings.seed, number, reach, beyond, history.unordered(turn), c.programmatic};
    engine();
    for (Memory *memory : reach) {
        if (opened.insert(memory).second) {
            memory->open();
        }
    }
    const std::uint32_t first = executor->epoch + 1;
    const bool good = executor->run(launch);
    history.add(turn, first, executor->epoch,
                std::string(c.kernel->name) + " (launch " + std::to_string(number) + ", stream " +
                    std::to_string(turn.stream) + ")");
    if (!good) {
        fail(device, executor->fault.code, executor->fault.report);
        log_line("fault", "\"kernel\":" + json(c.kernel->name) + ",\"kind\":" + json(executor->fault.kind) +
                              ",\"where\":" + json(executor->fault.where) + ",\"launch\":" +
                              std::to_string(number) + ",\"code\":" + std::to_string(executor->fault.code));
    }
}

// The device is lost: what is enqueued on it is forgotten, every later call gets the code.
void Driver::fail(Device *device, CUresult code, const std::string &report) {
    say(report);
    device->sticky = code;
    lent.erase(std::remove_if(lent.begin(), lent.end(), [&](const Lent &l) { return l.device == device; }),
               lent.end());
    std::vector<Stream *> all(streams.begin(), streams.end());
    all.push_back(&device->legacy);
    for (Stream *s : all) {
        if (s->device == device) {
            for (const Work &work : s->queue) {
                pending.erase(work.number);
            }
            s->queue.clear();
        }
    }
    if (settings.abort) {
        std::abort();
    }
}

// ---- what the host may touch when
// ---------------------------------------------------------------------------

namespace {

// Of all rows: any change of a byte changes it but for one in 2^64.
std::uint64_t hash_of(const Place &from, std::size_t bytes, std::size_t rows) {
    std::uint64_t hash = bytes;
    for (std::size_t row = 0; row < rows; row++) {
        const auto *at = reinterpret_cast<const unsigned char *>(from.address + row * from.pitch);
        for (std::size_t i = 0; i < bytes; i += 8) {
            std::uint64_t word = 0;
            std::memcpy(&word, at + i, std::min<std::size_t>(8, bytes - i));
            hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
            hash ^= hash >> 29;
        }
    }
    return hash;
}

} // namespace

void Driver::lend(Stream *stream, const Command &c) {
    lent.push_back(Lent{stream->device, stream->number, works + 1, c.from, c.bytes, c.rows,
                        hash_of(c.from, c.bytes, c.rows)});
}

bool Driver::unchanged(const Lent &l) {
    if (hash_of(l.from, l.bytes, l.rows) == l.hash) {
        return true;
    }
    const std::string what = "page-locked memory that an upload of " + std::to_string(l.bytes * l.rows) +
                             " bytes reads (stream " + std::to_string(l.stream) +
                             ") was changed before anything waited for the upload";
    log_line("fault", "\"kind\":\"upload changed\",\"what\":" + json(what));
    fail(l.device, LAUNCH_FAILED,
         "emulated device: " + what + "\n    work " + std::to_string(l.work) + ", seed " +
             std::to_string(settings.seed) + "\n");
    return false;
}

void Driver::waited(const Clock &clock) {
    host.join(clock);
    for (std::size_t i = 0; i < lent.size();) {
        if (!host.covers(lent[i].stream, lent[i].work)) {
            i++;
            continue;
        }
        const Lent back = lent[i];
        lent.erase(lent.begin() + static_cast<std::ptrdiff_t>(i));
        if (!unchanged(back)) {
            return;
        }
    }
}

// ---- for the entry points
// -----------------------------------------------------------------------------------

Stream *Driver::stream_of(void *handle) {
    if (reinterpret_cast<std::uintptr_t>(handle) <= 2) { // null, legacy, per thread (treated as legacy)
        return &current_device->legacy;
    }
    auto *stream = static_cast<Stream *>(handle);
    return streams.count(stream) != 0 ? stream : nullptr;
}

bool Driver::is_pinned(std::uintptr_t address, std::size_t bytes) const {
    auto next = pinned.upper_bound(address);
    if (next == pinned.begin()) {
        return false;
    }
    const auto &range = *std::prev(next);
    return address - range.first <= range.second && bytes <= range.second - (address - range.first);
}

Memory *Driver::memory_of(std::uintptr_t address) const {
    for (const auto &device : devices) {
        if (device->memory.contains(address)) {
            return &device->memory;
        }
    }
    return nullptr;
}

CUresult Driver::forbid_in_capture() {
    const std::uint64_t me = reinterpret_cast<std::uint64_t>(&current_device); // one per thread
    for (Stream *s : streams) {
        if (s->capture && (s->capture->mode == 0 || (s->capture->mode == 1 && s->capture->thread == me))) {
            s->capture->invalid = true;
            return CAPTURE_UNSUPPORTED;
        }
    }
    return SUCCESS;
}

} // namespace emu
