#pragma once
// The ops that have a CUDA kernel: the calls of csrc/cpu, whose pointers are a device's. Nothing is
// allocated and nothing waits: a call can be captured in a CUDA graph.

#include "core/clustering.h"
#include "core/l2_sp.h"
#include "core/reconstruction.h"

namespace ssl_fast {
namespace cuda {

std::size_t workspace_bytes(const CentroidUpdate& call);
std::size_t workspace_bytes(const L2Sp& call);
std::size_t workspace_bytes(const Reconstruction& call);

// On the current device and the stream of this address; 0, or the CUDA runtime's error. `threads`,
// CentroidUpdate's `largest` and Reconstruction's `outside` are not looked at.
int run(const CentroidUpdate& call, void* stream);
int run(const L2Sp& call, void* stream);
int run(const Reconstruction& call, void* stream);

// The words for an error of run or use.
const char* message_of(int error);
// Makes a device the current one; an error where these kernels can't run there.
int use(int device);

}  // namespace cuda
}  // namespace ssl_fast
