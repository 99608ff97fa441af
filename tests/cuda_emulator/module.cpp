// The ops of csrc/cuda as a module of their own, whose device is the emulator.

#include "bindings.h"

namespace ssl_fast {

// There are no CPU kernels here.
const Isa& active_isa() {
    static const Isa none{};
    return none;
}

}  // namespace ssl_fast

PYBIND11_MODULE(emulated_cuda, module) {
    ssl_fast::bind_clustering(module);
    ssl_fast::bind_mae(module);
    ssl_fast::bind_reconstruction(module);
}
