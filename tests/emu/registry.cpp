// registry.cpp: kernels by name.
#include "registry.h"

#include <map>
#include <string>

namespace emu {

static std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

Registered::Registered(const Kernel &kernel) { kernels().emplace(kernel.name, kernel); }

const Kernel *find_kernel(const char *name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

} // namespace emu
