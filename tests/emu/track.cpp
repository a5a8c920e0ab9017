// track.cpp: the words for what track.h finds.
#include "track.h"

#include "memory.h"
#include "report.h"

namespace emu {

namespace {

std::string thread_name(unsigned thread) {
    return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / LANES) + ")";
}

std::string reader_name(const Trace &c) {
    return c.reader < ONE_WARP  ? thread_name(c.reader)
           : c.reader < SEVERAL ? "several lanes of warp " + std::to_string(c.reader & ~ONE_WARP)
           : c.reader == BLOCKS ? "several blocks"
                                : "several warps";
}

std::string access_name(Access access, std::size_t bytes) {
    return std::string(verb(access)) + " of " + std::to_string(bytes) + " bytes";
}

std::string place(std::uintptr_t address) {
    for (Memory *memory : hot.executor->launch->memories) {
        if (memory->contains(address)) {
            return memory->describe(address);
        }
    }
    return "?";
}

} // namespace

const char *verb(Access access) {
    return access == Access::Read ? "read" : access == Access::Write ? "write" : "atomic update";
}

void shared_race(const Cell &c, bool with_write, std::uintptr_t address, std::size_t bytes, Access access,
                 const void *pc, const std::string &whose) {
    const auto *entry = static_cast<const char *>(hot.executor->launch->kernel->entry);
    hot.executor->fail(
        719, "race in shared memory",
        access_name(access, bytes) + " at shared byte " + std::to_string(address - hot.shared) + whose + ", which " +
            (with_write ? thread_name(c.writer) + " wrote" : reader_name(c) + " read") + " at " +
            mark_line(entry + (with_write ? c.write_line : c.read_line)) + " with no barrier in between",
        pc);
}

void nothing_in_shared(std::uintptr_t address, std::size_t bytes, const void *pc) {
    hot.executor->fail(719, "uninitialised shared memory",
                       access_name(Access::Read, bytes) + " at shared byte " +
                           std::to_string(address - hot.shared) + ", which nothing in this block has written",
                       pc);
}

void global_race(const Trace &c, bool with_write, std::uintptr_t address, std::size_t bytes, Access access,
                 const void *pc) {
    const Executor &ex = *hot.executor;
    const std::uint32_t epoch = with_write ? c.write_epoch : c.read_epoch;
    std::string who = with_write ? thread_name(c.writer) + " wrote" : reader_name(c) + " read";
    const bool other = other_block(epoch, ex.begun());
    if (other && (with_write || c.reader != BLOCKS)) {
        const Dim b = ex.block_of(epoch);
        who = "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) +
              "), " + who;
    }
    hot.executor->fail(
        719, "race in global memory",
        access_name(access, bytes) + " at " + place(address) + ", which " + who + " in this launch" +
            (other || (!with_write && c.reader == BLOCKS) ? ": blocks are not ordered"
                                                                           : " with no barrier in between"),
        pc);
}

void look_for_unordered(const Trace *first, std::size_t count, std::uintptr_t address, std::size_t bytes,
                        Access access, const void *pc) {
    Executor &ex = *hot.executor;
    auto &hidden_readers = ex.blocks[0]->hidden_readers; // of the launch: blocks of a cluster share it
    const bool waited = hot.self->waited;
    const auto other = [&](std::uint32_t epoch) -> const Unordered * {
        if (epoch < ex.unordered_from || epoch >= ex.launch_epoch) {
            return nullptr;
        }
        const Unordered *found = find_unordered(ex.launch->unordered, epoch);
        return found != nullptr && found->until_wait && waited ? nullptr : found;
    };
    for (const Trace *c = first; c != first + count; c++) {
        const bool commute = access == Access::Atomic && c->writer == ATOMIC;
        const Unordered *writer = commute ? nullptr : other(c->write_epoch), *reader = other(c->read_epoch);
        if (reader != nullptr && reader->until_wait && access == Access::Read) {
            hidden_readers[c] = c->read_epoch; // this read takes its place in the trace
        }
        if (reader == nullptr && access != Access::Read && !hidden_readers.empty()) {
            const auto hidden = hidden_readers.find(c);
            reader = hidden != hidden_readers.end() ? other(hidden->second) : nullptr;
        }
        const Unordered *found = writer != nullptr || access == Access::Read ? writer : reader;
        if (found != nullptr) {
            const std::string conflict = access_name(access, bytes) + " at " + place(address) + ", which " +
                                         found->what + (writer != nullptr ? " wrote" : " read");
            if (found->until_wait) {
                ex.fail(719, "dependency wait missing or late",
                        conflict + ": this launch may begin before that one is over, and the thread has not come "
                                   "to grid_wait, nor to a barrier with one that has",
                        pc);
            }
            ex.fail(719, "race between launches", conflict + ": no stream, event or wait puts one before the other",
                    pc);
        }
    }
}

void nothing_in_global(std::uintptr_t address, std::size_t bytes, const void *pc) {
    hot.executor->fail(
        719, "uninitialised memory",
        access_name(Access::Read, bytes) + " at " + place(address) + ": nothing has written all of it", pc);
}

} // namespace emu
