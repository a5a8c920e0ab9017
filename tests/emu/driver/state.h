// state.h: what the emulated driver remembers.
//
// Work that a program enqueues is not done then, but when something waits for it, and only as much of it as
// that needs:
//
//     stream A   [copy 1] [record e: 2] [launch 5]     cuStreamSynchronize(B) runs 3, then 1 and 2 (4
//     stream B   [launch 3] [wait e: 4] [launch 6]     waits for e), then 6. Launch 5 stays where it is.
//
// Every piece of work has a number, and names the numbers that must be done before it; they are always
// smaller. A program that forgot to wait finds poison. EMU_SEED chooses among three tempers: seed % 3 = 0
// lazy as above, 1 lazy with pieces done at random calls, 2 eager (done at once), which shows the opposite
// mistakes.
//
// One lock guards it all; kernels run under it.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../engine.h"
#include "../memory.h"
#include "../registry.h"
#include "abi.h"
#include "order.h"

namespace emu {

struct Stream;
struct Device;
struct GraphExec;

// One side of a copy.
struct Place {
    std::uintptr_t address;
    std::size_t pitch;
    Memory *memory; // null: the host's
};

struct Stamp {
    bool done = false;
    double seconds = 0;
};

struct Command {
    enum Kind { Launch, Copy, Fill, Record, Wait, Graph } kind = Wait;
    // Launch
    const Kernel *kernel = nullptr;
    std::vector<unsigned char> packed;
    Dim grid, block;
    std::size_t shared_bytes = 0;
    bool programmatic = false; // may begin while the launch before it in its stream runs
    Dim cluster;               // blocks
    // Copy: rows of bytes. Fill: rows of `bytes`, `value` of `unit` bytes over and over.
    Place to{}, from{};
    std::size_t bytes = 0, rows = 1;
    unsigned value = 0, unit = 1;
    std::shared_ptr<std::vector<unsigned char>> staged; // pageable source, read when enqueued
    // Record
    std::shared_ptr<Stamp> stamp;
    // Graph
    std::shared_ptr<const GraphExec> graph;
};

struct Work {
    std::uint64_t number;
    Device *device;
    int stream;
    std::vector<std::uint64_t> after;
    Command command;
    Clock clock; // what it comes after, and itself
    Clock begin; // what is over when it begins: less than it comes after, if it is programmatic
};

// Page-locked memory that an upload reads: nobody may change it before somebody waited for the upload.
struct Lent {
    Device *device;
    int stream;
    std::uint64_t work;
    Place from;
    std::size_t bytes, rows;
    std::uint64_t hash; // when it was enqueued
};

constexpr std::size_t NO_NODE = ~std::size_t{0};

struct Node {
    Command command;
    std::vector<std::size_t> after;
    std::size_t overlaps = NO_NODE; // one of `after`: a launch that may still run when this one begins
};

struct Graph {
    std::vector<Node> nodes;
    bool invalid = false;
    int mode = 0; // 0 global, 1 thread-local, 2 relaxed
    std::uint64_t thread = 0;
    Stream *origin = nullptr;
    std::set<Stream *> joined;
};

struct GraphExec {
    std::vector<Node> nodes;
    int number = 0;
};

struct Stream {
    int number = 0; // 0, -1, .. legacy ones
    Device *device = nullptr;
    bool blocking = true; // ordered with the legacy default stream
    bool legacy = false;
    std::deque<Work> queue;
    Clock clock; // of the newest work ever enqueued
    Clock begin; // of that work if it is a launch: what is over when a programmatic one that follows begins
    std::uint64_t last = 0; // the newest work ever enqueued
    // While capturing: what the next captured command comes after, and the stream's own last one.
    std::shared_ptr<Graph> capture;
    std::vector<std::size_t> tail;
    std::size_t captured = NO_NODE;
};

struct Event {
    std::uint64_t work = 0; // of the latest record
    Clock clock;            // the same
    std::shared_ptr<Stamp> stamp;
    bool timed = true;
    std::shared_ptr<Graph> capture; // recorded in a capture: depends on these nodes
    std::vector<std::size_t> tail;
};

struct Function {
    const Kernel *kernel;
    std::map<int, std::size_t> dynamic_shared; // by device: what cuFuncSetAttribute allowed
};

struct Module {
    std::map<std::string, std::unique_ptr<Function>> functions;
};

struct Device {
    Device(int index, std::size_t limit, bool races) : index(index), memory(index, limit, false, races) {
        legacy.device = this;
        legacy.legacy = true;
        legacy.number = -index;
    }
    int index;
    Memory memory;
    Stream legacy;
    int retained = 0;
    CUresult sticky = SUCCESS;
    std::set<Device *> peers; // whose memory this device's kernels may reach
};

struct Settings {
    int cc = 80;
    int devices = 1;
    std::uint64_t seed = 0;
    std::size_t memory = std::size_t{4} << 30;
    std::string fail;
    bool abort = false;   // on a fault of a kernel
    bool races = true;    // look for races and reads of nothing in device memory
    bool no_peer = false; // devices cannot reach one another
};

struct Driver {
    std::mutex lock;
    bool initialised = false;
    Settings settings;
    std::vector<std::unique_ptr<Device>> devices;
    std::set<Stream *> streams;
    std::set<Event *> events;
    std::set<Module *> modules;
    std::map<void *, std::shared_ptr<Graph>> graphs;
    std::map<void *, std::shared_ptr<GraphExec>> executables;
    std::map<std::uintptr_t, std::size_t> pinned; // page-locked host ranges
    std::map<std::uint64_t, Stream *> pending;    // work that is not done: where it waits
    std::uint64_t works = 0, launches = 0, allocations = 0, stream_count = 0, graph_count = 0;
    std::string last_report;
    Random random{0};
    std::unique_ptr<Executor> executor;
    int rounds = 0;            // of work under way: see work.cpp
    std::set<Memory *> opened; // to kernels, until the round ends
    Clock host;                // what the program waited for
    History history;
    std::vector<Lent> lent;

    // ---- work.cpp ----
    // Appends to the stream, or to the graph that it captures. The code to return.
    CUresult enqueue(Stream *stream, Command command, std::vector<std::uint64_t> after = {});
    void finish(std::uint64_t work); // does it, and what it needs
    void finish_stream(Stream *stream);
    void finish_device(Device *device);
    // The program knows now that all this is over, done as it is: looks at what it had lent.
    void waited(const Clock &clock);
    void lend(Stream *stream, const Command &copy); // about to be enqueued
    bool done(std::uint64_t work) const { return pending.find(work) == pending.end(); }
    // One piece of what `work` needs, if anything: for polls.
    void advance(std::uint64_t work);
    // A call happened: some tempers use the occasion.
    void occasion();

    // ---- for the entry points ----
    Stream *stream_of(void *handle); // null: no such stream
    bool is_pinned(std::uintptr_t address, std::size_t bytes) const;
    Memory *memory_of(std::uintptr_t address) const;
    // A call that must not happen while some capture forbids it: its code; the capture is spoilt.
    CUresult forbid_in_capture();

  private:
    void perform_front(Stream *stream);
    void perform(Device *device, const Command &command, int graph, const Turn &turn);
    void perform_launch(Device *device, const Command &command, const Turn &turn);
    // What a copy or fill reads or writes on a device: leaves its trace; false after a race.
    bool trace(Device *device, const Command &command, const Turn &turn);
    bool unchanged(const Lent &lent); // else a report
    Executor &engine();
    void fail(Device *device, CUresult code, const std::string &report);
};

Driver &driver();
extern thread_local Device *current_device; // the context that this thread made current

// ---- settings.cpp: environment, log, planted failures ----

void read_settings();
// One JSON line: fields as `"name":value` pairs already in JSON, after "event" and the time.
void log_line(const std::string &event, const std::string &fields);
bool logging();
std::string json(const std::string &text);
// EMU_FAIL: the code for this launch (0: none), whether this allocation fails.
CUresult planted_launch_failure(const char *kernel, int device);
bool planted_allocation_failure();
void say(const std::string &report); // to stderr, kept as the last report

void install_fault_handler();

} // namespace emu

// The beginning of an entry point that works on the current device.
#define ENTER()                                     \
    emu::Driver &d = emu::driver();                 \
    const std::lock_guard<std::mutex> held(d.lock); \
    if (!d.initialised)                             \
        return NOT_INITIALIZED;                     \
    emu::Device *device = emu::current_device;      \
    if (device == nullptr)                          \
        return INVALID_CONTEXT;                     \
    if (device->sticky != SUCCESS)                  \
        return device->sticky;                      \
    d.occasion();                                   \
    if (device->sticky != SUCCESS)                  \
    return device->sticky

#define CUAPI extern "C" __attribute__((visibility("default"))) CUresult
