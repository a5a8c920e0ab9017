// plant.h: faults of launchers and runtimes, planted where they speak to the driver: EMU_PLANT, for tests of tests.
//
//     skip:CALL[:STREAM[:N]]    the call does nothing and says that all went well: cuEventRecord, cuEventSynchronize,
//                               cuStreamSynchronize, cuStreamWaitEvent; with STREAM, on that stream alone; with N,
//                               the N-th of them
//     skip:upload:BYTES         copies of so many bytes from the host do nothing
//     skip:KERNEL               launches do nothing
//     roll:BYTES:N              copies of so many bytes from the host bring byte i + N where byte i belongs
//     change:KERNEL:AT:N        adds N to the 4-byte integer at byte AT of the arguments; change8: of 8 bytes
//     scale:KERNEL:AT:X         multiplies the float there
//     swap:KERNEL:AT:AT:BYTES   swaps bytes of the arguments
//     grid:KERNEL:X:Y           blocks more
//     shared:KERNEL:BYTES       dynamic shared memory more
//     stream:KERNEL             launches go to the legacy default stream
//     alloc:N:BYTES             the N-th device allocation has BYTES more
//     instantiate:N             the N-th graph has the nodes of the one before
//
// KERNEL is a name, or how names begin and a star. Several with commas. emu_planted() counts what was done.
#pragma once

#include <string>
#include <vector>

#include "state.h"

namespace emu {

bool read_plants(const std::string &text); // false: not understood

bool planted_skip(const char *call, const Stream *stream = nullptr);
// Changes a launch on its way in; false: it is left out.
bool planted_launch(Command &launch, Stream *&stream, Device *device);
// Changes an upload (its bytes, as staged memory); false: it is left out.
bool planted_upload(Command &copy);
std::size_t planted_bytes(std::size_t bytes); // of the next allocation
void planted_graph(GraphExec &made);

} // namespace emu
