// api_stream.cpp: streams, events, capture and graphs.
#include "plant.h"
#include "state.h"

using namespace emu;

namespace {

std::uint64_t this_thread() { return reinterpret_cast<std::uint64_t>(&current_device); }

Event *event_of(Driver &d, void *handle) {
    auto *event = static_cast<Event *>(handle);
    return d.events.count(event) != 0 ? event : nullptr;
}

// The end of a stream's part in a capture.
void leave_capture(Stream *stream) {
    stream->capture.reset();
    stream->tail.clear();
    stream->captured = NO_NODE;
}

CUresult spoil(Stream *stream) {
    stream->capture->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

} // namespace

// ---- streams
// ------------------------------------------------------------------------------------------------

CUAPI cuStreamCreate(void **out, unsigned flags) {
    ENTER();
    auto *stream = new Stream;
    stream->number = static_cast<int>(++d.stream_count);
    stream->device = device;
    stream->blocking = (flags & 1) == 0;
    d.streams.insert(stream);
    *out = stream;
    return SUCCESS;
}
CUAPI cuStreamCreateWithPriority(void **out, unsigned flags, int) { return cuStreamCreate(out, flags); }

CUAPI cuStreamDestroy_v2(void *handle) {
    ENTER();
    Stream *stream = d.stream_of(handle);
    if (stream == nullptr || stream->legacy) {
        return INVALID_HANDLE;
    }
    d.finish_stream(stream);
    d.streams.erase(stream);
    delete stream;
    return SUCCESS;
}

CUAPI cuStreamSynchronize(void *handle) {
    ENTER();
    Stream *stream = d.stream_of(handle);
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    if (stream->capture) {
        return spoil(stream);
    }
    if (planted_skip("cuStreamSynchronize", stream)) {
        return SUCCESS;
    }
    d.finish_stream(stream);
    d.waited(stream->clock);
    return device->sticky;
}

// A poll moves one piece of work on, every other time: a loop of polls ends, and "not ready" is seen.
CUAPI cuStreamQuery(void *handle) {
    ENTER();
    Stream *stream = d.stream_of(handle);
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    if (stream->capture) {
        return spoil(stream);
    }
    if (d.done(stream->last)) {
        d.waited(stream->clock);
        return device->sticky;
    }
    if (d.random.below(2) == 0) {
        d.advance(stream->last);
    }
    return device->sticky != SUCCESS ? device->sticky : NOT_READY;
}

CUAPI cuStreamWaitEvent(void *handle, void *event_handle, unsigned flags) {
    (void)flags;
    ENTER();
    Stream *stream = d.stream_of(handle);
    Event *event = event_of(d, event_handle);
    if (stream == nullptr || event == nullptr) {
        return INVALID_HANDLE;
    }
    if (planted_skip("cuStreamWaitEvent", stream)) {
        return SUCCESS;
    }
    if (event->capture) {
        // The stream joins the capture in which the event was recorded.
        if (stream->capture && stream->capture != event->capture) {
            return CAPTURE_MERGE;
        }
        if (!stream->capture) {
            if (stream->legacy || event->capture->invalid) {
                return stream->legacy ? CAPTURE_UNSUPPORTED : CAPTURE_INVALIDATED;
            }
            stream->capture = event->capture;
            stream->capture->joined.insert(stream);
        }
        stream->tail.insert(stream->tail.end(), event->tail.begin(), event->tail.end());
        return SUCCESS;
    }
    if (stream->capture) {
        stream->capture->invalid = true;
        return CAPTURE_ISOLATION;
    }
    stream->clock.join(event->clock);
    stream->begin.join(event->clock);
    if (event->work == 0 || d.done(event->work)) {
        return SUCCESS;
    }
    Command c;
    c.kind = Command::Wait;
    return d.enqueue(stream, std::move(c), {event->work});
}

CUAPI cuStreamGetCtx(void *handle, void **context) {
    ENTER();
    Stream *stream = d.stream_of(handle);
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    *context = stream->device;
    return SUCCESS;
}

// ---- events
// -------------------------------------------------------------------------------------------------

CUAPI cuEventCreate(void **out, unsigned flags) {
    ENTER();
    auto *event = new Event;
    event->timed = (flags & 2) == 0;
    d.events.insert(event);
    *out = event;
    return SUCCESS;
}

CUAPI cuEventDestroy_v2(void *handle) {
    ENTER();
    Event *event = event_of(d, handle);
    if (event == nullptr) {
        return INVALID_HANDLE;
    }
    d.events.erase(event);
    delete event;
    return SUCCESS;
}

CUAPI cuEventRecord(void *event_handle, void *handle) {
    ENTER();
    Stream *stream = d.stream_of(handle);
    Event *event = event_of(d, event_handle);
    if (stream == nullptr || event == nullptr) {
        return INVALID_HANDLE;
    }
    if (planted_skip("cuEventRecord", stream)) {
        return SUCCESS;
    }
    if (stream->capture) {
        event->capture = stream->capture;
        event->tail = stream->tail;
        return SUCCESS;
    }
    event->capture.reset();
    Command c;
    c.kind = Command::Record;
    c.stamp = event->stamp = std::make_shared<Stamp>();
    const CUresult code = d.enqueue(stream, std::move(c));
    event->work = stream->last;
    event->clock = stream->clock;
    return code;
}
CUAPI cuEventRecordWithFlags(void *event, void *stream, unsigned) { return cuEventRecord(event, stream); }

CUAPI cuEventSynchronize(void *handle) {
    ENTER();
    Event *event = event_of(d, handle);
    if (event == nullptr) {
        return INVALID_HANDLE;
    }
    if (event->capture) {
        event->capture->invalid = true;
        return 907; // captured event
    }
    if (planted_skip("cuEventSynchronize")) {
        return SUCCESS;
    }
    d.finish(event->work);
    d.waited(event->clock);
    return device->sticky;
}

CUAPI cuEventQuery(void *handle) {
    ENTER();
    Event *event = event_of(d, handle);
    if (event == nullptr) {
        return INVALID_HANDLE;
    }
    if (event->capture) {
        event->capture->invalid = true;
        return 907;
    }
    if (d.done(event->work)) {
        d.waited(event->clock);
        return device->sticky;
    }
    if (d.random.below(2) == 0) {
        d.advance(event->work);
    }
    return device->sticky != SUCCESS ? device->sticky : NOT_READY;
}

CUAPI cuEventElapsedTime_v2(float *milliseconds, void *from_handle, void *to_handle) {
    ENTER();
    Event *from = event_of(d, from_handle), *to = event_of(d, to_handle);
    if (from == nullptr || to == nullptr || !from->timed || !to->timed || !from->stamp || !to->stamp) {
        return INVALID_HANDLE;
    }
    if (!from->stamp->done || !to->stamp->done) {
        return NOT_READY;
    }
    *milliseconds = static_cast<float>((to->stamp->seconds - from->stamp->seconds) * 1e3);
    return SUCCESS;
}
CUAPI cuEventElapsedTime(float *milliseconds, void *from, void *to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}

// ---- capture
// ------------------------------------------------------------------------------------------------

CUAPI cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER();
    Stream *stream = d.stream_of(handle);
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    if (stream->legacy || mode < 0 || mode > 2) {
        return stream->legacy ? CAPTURE_UNSUPPORTED : INVALID_VALUE;
    }
    if (stream->capture) {
        return CAPTURE_UNMATCHED;
    }
    stream->capture = std::make_shared<Graph>();
    stream->capture->mode = mode;
    stream->capture->thread = this_thread();
    stream->capture->origin = stream;
    return SUCCESS;
}

CUAPI cuStreamEndCapture(void *handle, void **out) {
    ENTER();
    Stream *stream = d.stream_of(handle);
    *out = nullptr;
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    if (!stream->capture) {
        return INVALID_VALUE;
    }
    const std::shared_ptr<Graph> graph = stream->capture;
    if (graph->origin != stream) {
        return CAPTURE_UNMATCHED;
    }
    if (graph->mode != 2 && graph->thread != this_thread()) {
        return CAPTURE_WRONG_THREAD;
    }
    // Everything must lead to the last node of the stream where it began.
    std::vector<bool> reached(graph->nodes.size());
    std::vector<std::size_t> next = stream->tail;
    while (!next.empty()) {
        const std::size_t node = next.back();
        next.pop_back();
        if (!reached[node]) {
            reached[node] = true;
            next.insert(next.end(), graph->nodes[node].after.begin(), graph->nodes[node].after.end());
        }
    }
    bool joined = true;
    for (const bool r : reached) {
        joined = joined && r;
    }
    leave_capture(stream);
    for (Stream *other : graph->joined) {
        if (d.streams.count(other) != 0 && other->capture == graph) {
            leave_capture(other);
        }
    }
    if (graph->invalid || !joined) {
        return graph->invalid ? CAPTURE_INVALIDATED : CAPTURE_UNJOINED;
    }
    graph->joined.clear();
    d.graphs[graph.get()] = graph;
    *out = graph.get();
    return SUCCESS;
}

CUAPI cuStreamIsCapturing(void *handle, int *status) {
    ENTER();
    Stream *stream = d.stream_of(handle);
    if (stream == nullptr) {
        return INVALID_HANDLE;
    }
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return SUCCESS;
}

// ---- graphs
// -------------------------------------------------------------------------------------------------

CUAPI cuGraphGetNodes(void *handle, void **nodes, std::size_t *count) {
    ENTER();
    const auto found = d.graphs.find(handle);
    if (found == d.graphs.end() || nodes != nullptr) {
        return found == d.graphs.end() ? INVALID_HANDLE : NOT_SUPPORTED;
    }
    *count = found->second->nodes.size();
    return SUCCESS;
}

CUAPI cuGraphInstantiateWithFlags(void **out, void *handle, unsigned long long flags) {
    (void)flags;
    ENTER();
    const auto found = d.graphs.find(handle);
    if (found == d.graphs.end()) {
        return INVALID_HANDLE;
    }
    auto exec = std::make_shared<GraphExec>();
    exec->nodes = found->second->nodes;
    planted_graph(*exec);
    exec->number = static_cast<int>(++d.graph_count);
    d.executables[exec.get()] = exec;
    *out = exec.get();
    log_line("instantiate", "\"graph\":" + std::to_string(exec->number) +
                                ",\"nodes\":" + std::to_string(exec->nodes.size()));
    return SUCCESS;
}

CUAPI cuGraphUpload(void *handle, void *stream) {
    ENTER();
    return d.executables.count(handle) == 0 || d.stream_of(stream) == nullptr ? INVALID_HANDLE : SUCCESS;
}

CUAPI cuGraphLaunch(void *handle, void *stream_handle) {
    ENTER();
    const auto found = d.executables.find(handle);
    Stream *stream = d.stream_of(stream_handle);
    if (found == d.executables.end() || stream == nullptr) {
        return INVALID_HANDLE;
    }
    if (stream->capture) {
        return spoil(stream); // child graphs are not modelled
    }
    Command c;
    c.kind = Command::Graph;
    c.graph = found->second;
    return d.enqueue(stream, std::move(c));
}

CUAPI cuGraphExecDestroy(void *handle) {
    ENTER();
    return d.executables.erase(handle) != 0 ? SUCCESS : INVALID_HANDLE;
}

CUAPI cuGraphDestroy(void *handle) {
    ENTER();
    return d.graphs.erase(handle) != 0 ? SUCCESS : INVALID_HANDLE;
}
