// Products of 17 to 64 rows by SGLang's Marlin kernel, in the tile of 128 outputs by 128 inputs that
// SGLang has for up to 16. A row's sums are cut into the same parts then, whatever the number of rows.
// Compiled by SGLang's JIT, with its headers; margingate/runtime/compat/compute/marlin_rows.py calls it.
#pragma once

#include <gemm/marlin/gptq_marlin.cuh>

#include <tvm/ffi/container/tensor.h>

namespace margingate {

namespace marlin = sglang::device::marlin;
using tvm::ffi::TensorView;

constexpr int kTile = 8;  // blocks of 16 outputs, and of 16 inputs
constexpr int kThreads = 256;
constexpr int kMostRows = 64;
constexpr int kBits = 4;  // of a weight

template <typename scalar_t, int64_t type_id, int group_blocks, int row_blocks>
void launch(
    TensorView rows,
    TensorView weight,
    TensorView scales,
    TensorView zeros,
    TensorView results,
    TensorView partial,
    TensorView locks) {
  using namespace sglang::host;
  auto kernel = marlin::Marlin<
      scalar_t,
      type_id,
      kThreads,
      row_blocks,
      kTile,
      kTile,
      false,
      marlin::pipe_stages,
      group_blocks,
      false>;
  const DLDevice device = rows.device();
  int shared = 0, processors = 0;
  RuntimeDeviceCheck(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.device_id));
  RuntimeDeviceCheck(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device.device_id));
  RuntimeDeviceCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const int needed = marlin::get_kernel_cache_size(
      {16 * kTile, 16 * kTile, kThreads},
      row_blocks,
      static_cast<int>(rows.size(0)),
      static_cast<int>(results.size(1)),
      static_cast<int>(rows.size(1)),
      kBits,
      16 * group_blocks,
      false,
      true,
      zeros.size(0) > 0,
      false);
  RuntimeCheck(needed <= shared, "a tile of ", 16 * row_blocks, " rows needs ", needed, " of ", shared, " bytes");
  RuntimeCheck(rows.stride(1) == 1 && rows.stride(0) % 8 == 0, "rows have gaps, or begin within 16 bytes");
  RuntimeCheck(locks.size(0) >= processors, locks.size(0), " locks are fewer than the ", processors, " blocks");
  LaunchKernel(processors, kThreads, LaunchKernel::resolve_device(device), shared)(
      kernel,
      static_cast<const int4*>(rows.data_ptr()),
      static_cast<const int4*>(weight.data_ptr()),
      static_cast<int4*>(results.data_ptr()),
      static_cast<int4*>(partial.data_ptr()),
      static_cast<const int4*>(scales.data_ptr()),
      static_cast<const uint16_t*>(nullptr),  // a scale of all weights, of other types
      static_cast<const int4*>(zeros.data_ptr()),
      static_cast<const int*>(nullptr),  // the order of inputs, where it is another
      static_cast<int>(scales.size(0)),
      static_cast<int>(rows.size(0)),
      static_cast<int>(results.size(1)),
      static_cast<int>(rows.size(1)),
      static_cast<int>(rows.stride(0)),
      static_cast<int*>(locks.data_ptr()),
      false,                // no atomic adds
      partial.size(0) > 0,  // partial sums of blocks are added in float32
      shared);
}

// Args: rows [rows, inputs]; weight, scales, zeros as SGLang's gptq_marlin_gemm has them; results
// [rows, outputs]; partial float32 [blocks * 64 * 128] or [0]; locks int32, zero, one a block.
template <typename scalar_t, int64_t type_id, int group_blocks>
void marlin_rows(
    TensorView rows,
    TensorView weight,
    TensorView scales,
    TensorView zeros,
    TensorView results,
    TensorView partial,
    TensorView locks) {
  const int64_t count = rows.size(0);
  if (count > 48 && count <= kMostRows) {
    launch<scalar_t, type_id, group_blocks, 4>(rows, weight, scales, zeros, results, partial, locks);
  } else if (count > 32 && count <= 48) {
    launch<scalar_t, type_id, group_blocks, 3>(rows, weight, scales, zeros, results, partial, locks);
  } else {
    sglang::host::RuntimeCheck(count > 16 && count <= 32, "17 to 64 rows, not ", count);
    launch<scalar_t, type_id, group_blocks, 2>(rows, weight, scales, zeros, results, partial, locks);
  }
}

}  // namespace margingate
