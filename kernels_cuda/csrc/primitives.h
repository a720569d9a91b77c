// What a kernel body may use: the Hopper primitives, as instructions under nvcc, as an emulator under a host compiler.
// A kernel includes this file and tile.cuh, never a CUDA header and never asm, so that one source runs in both.
#pragma once

#if defined(__CUDACC__)
#include "ptx.cuh"
#else
#include "emulator/primitives.h"
#endif
