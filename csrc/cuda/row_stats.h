// Row statistics on a CUDA device; the contract of kernels/reference.py row_stats.
#pragma once

#include <cstdint>

#include "../logits_view.h"

namespace onepass {

// Writes stats [4, N] on `stream` of `device`. Throws std::runtime_error where CUDA reports an
// error.
void row_stats_cuda(const LogitsView& logits, const int64_t* token_ids, const RowScale& scale,
                    float* stats, int device, uintptr_t stream);

}  // namespace onepass
