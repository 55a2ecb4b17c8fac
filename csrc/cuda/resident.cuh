// One read and one write: a row stays in the shared memory of a cluster of blocks, one part in each,
// between its statistics and its gradient.
//
// A block owns one slot, large enough for its part, in chunks of 16 KiB with a barrier each. Sums
// are taken of a chunk as soon as it has arrived; the blocks exchange 8 small entries each; every
// block joins all entries in the same order and computes the token loss itself, which costs less
// than sending it round. The gradient of a chunk is computed in place and stored in bulk, and as
// soon as the store has read it the same chunk of the next row is loaded into its place: reads and
// writes of memory overlap inside a block, and the more so between the (up to three) blocks of a
// multiprocessor.
//
// Addresses that are not a multiple of 16 only shift the row in its slot by `lead` bytes. Its first
// and last bytes that share 16 with a neighbour are copied by plain loads and stores.
#pragma once

#include "row_tasks.cuh"

namespace onepass {

constexpr int kMaxChunks = 15;  // of the 227 KiB that a block can have
constexpr int kBlocksPerMultiprocessor = 3;

// The start of a block's shared memory; its slot follows.
struct Scratch {
  Entry entries[kMaxEntries];
  RowGrad grad;
  Barrier arrived[kMaxChunks];
};
constexpr int kScratchBytes = 704;
static_assert(sizeof(Scratch) <= kScratchBytes, "three blocks of 76032 bytes a row share 228 KiB");

#if ONEPASS_HAS_CLUSTERS

// A block's part of one row, in global memory and in its slot.
struct Slice {
  const char* from;  // first byte of its logits
  char* to;          // of its gradient
  int lead;          // bytes of the slot before it
  int end;           // of the slot, where it ends

  // Bytes of the slot that lie in whole, aligned packs of this row: [inner_begin, inner_end).
  __device__ int inner_begin() const {
    const int aligned = (lead + kPackBytes - 1) / kPackBytes * kPackBytes;
    return aligned < end ? aligned : end;
  }
  __device__ int inner_end() const {
    const int aligned = end / kPackBytes * kPackBytes;
    return aligned > inner_begin() ? aligned : inner_begin();
  }
};

__device__ inline Slice slice_of(const Rows& rows, const LogitsView& grad, int n, int part) {
  const int64_t skipped = int64_t{part} * rows.part_columns * rows.logits.element_size();
  const char* from = row_of(rows.logits, n) + skipped;
  char* to = grad.data ? row_of(grad, n) + skipped : nullptr;
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(from) % kPackBytes);
  const int bytes = rows.columns_of(part) * static_cast<int>(rows.logits.element_size());
  return {from, to, lead, lead + bytes};
}

// Calls copy(element) for the loose elements of a slice in bytes [begin, end) of the slot, on the
// lanes of one warp: at most 7 before the whole packs and 7 after them.
template <class Bits, class Copy>
__device__ void for_loose_elements(const Slice& slice, int begin, int end, const Copy& copy) {
  constexpr int kMost = kPackBytes / sizeof(Bits);
  const int lane = thread_index() % kWarpSize;
  if (lane >= 2 * kMost) return;
  const bool before = lane < kMost;
  const int first = before ? slice.lead : slice.inner_end();
  const int last = before ? slice.inner_begin() : slice.end;
  const int at = first + (lane % kMost) * static_cast<int>(sizeof(Bits));
  if (at < last && at >= begin && at < end) copy(at);
}

// The slot of a block. Loads and stores are made by its first warp.
template <class Bits>
struct Slot {
  char* bytes;
  Barrier* arrived;
  int num_chunks;

  __device__ void init() {
    if (thread_index() == 0) {
#pragma unroll 1
      for (int k = 0; k < num_chunks; ++k) barrier_init(&arrived[k], 1);
      publish_barriers();
    }
  }

  // Every chunk of every row is loaded, empty or not, so that all barriers keep the same parity.
  __device__ void load_chunk(const Slice& slice, int chunk) const {
    const int begin = chunk * kTileBytes, end = begin + kTileBytes;
    for_loose_elements<Bits>(slice, begin, end, [&](int at) {
      *reinterpret_cast<Bits*>(bytes + at) =
          *reinterpret_cast<const Bits*>(slice.from + (at - slice.lead));
    });
    warp_sync();
    if (thread_index() != 0) return;
    const int first = max(begin, slice.inner_begin()), last = min(end, slice.inner_end());
    barrier_arrive_expecting(&arrived[chunk], max(last - first, 0));
    if (first < last) {
      bulk_load(bytes + first, slice.from + (first - slice.lead), last - first, &arrived[chunk]);
    }
  }

  __device__ void load(const Slice& slice) const {
#pragma unroll 1
    for (int k = 0; k < num_chunks; ++k) load_chunk(slice, k);
  }

  __device__ void store_chunk(const Slice& slice, int chunk) const {
    const int begin = chunk * kTileBytes, end = begin + kTileBytes;
    for_loose_elements<Bits>(slice, begin, end, [&](int at) {
      *reinterpret_cast<Bits*>(slice.to + (at - slice.lead)) =
          *reinterpret_cast<const Bits*>(bytes + at);
    });
    warp_sync();
    if (thread_index() != 0) return;
    const int first = max(begin, slice.inner_begin()), last = min(end, slice.inner_end());
    if (first < last) bulk_store(slice.to + (first - slice.lead), bytes + first, last - first);
    bulk_close_group();
  }
};

// 16 bytes at any even address of the slot: of words of 4 bytes, shifted together.
__device__ inline Pack load_unaligned(const char* from) {
  const uint32_t* words =
      reinterpret_cast<const uint32_t*>(from - reinterpret_cast<uintptr_t>(from) % 4);
  const bool odd = reinterpret_cast<uintptr_t>(from) % 4 != 0;
  Pack pack;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    pack.word[w] = odd ? words[w] >> 16 | words[w + 1] << 16 : words[w];
  }
  return pack;
}

template <DType kType, class Scaling, class Bits>
__device__ ThreadSums sums_of(const Slot<Bits>& slot, const Slice& slice, const Part& part,
                              const Scaling& scaling, int parity) {
  ThreadSums sums;
  const char* row = slot.bytes + slice.lead;
  for (int tile = 0; tile < slot.num_chunks; ++tile) {
    barrier_wait(&slot.arrived[tile], parity);
    if (slice.lead == 0) {
      add_tile<kType>(sums, part, tile, scaling, [&](int pack) {
        return *reinterpret_cast<const Pack*>(row + pack * kPackBytes);
      });
      continue;
    }
    // A shifted tile ends in the next chunk.
    if (tile + 1 < slot.num_chunks) barrier_wait(&slot.arrived[tile + 1], parity);
    add_tile<kType>(sums, part, tile, scaling,
                    [&](int pack) { return load_unaligned(row + pack * kPackBytes); });
  }
  return sums;
}

// The gradient of one chunk in place; elements of the slot outside the row become anything.
template <DType kType, bool kEntropy, class Scaling>
__device__ void chunk_to_gradient(char* bytes, const Slice& slice, int chunk, const RowGrad& grad,
                                  const Scaling& scaling, int target_in_slot) {
#pragma unroll
  for (int i = 0; i < kPacksPerThread; ++i) {
    const int pack = pack_of(chunk, i);
    if (pack * kPackBytes >= slice.end) return;
    Pack* at = reinterpret_cast<Pack*>(bytes + pack * kPackBytes);
    Pack columns = *at;
    to_gradient<kType, kEntropy>(columns, grad, scaling,
                                 target_in_slot - pack * kPackColumns<kType>);
    *at = columns;
  }
}

// Columns of a row that get no gradient.
template <class Bits>
__device__ void write_zeros(const Slice& slice) {
  if (thread_index() < kWarpSize) {
    for_loose_elements<Bits>(slice, 0, slice.end, [&](int at) {
      *reinterpret_cast<Bits*>(slice.to + (at - slice.lead)) = 0;
    });
  }
#pragma unroll 1
  for (int at = slice.inner_begin() + thread_index() * kPackBytes; at < slice.inner_end();
       at += kThreads * kPackBytes) {
    *reinterpret_cast<Pack*>(slice.to + (at - slice.lead)) = {};
  }
}

template <DType kType, class Scaling, class Task>
class ResidentBlock {
 public:
  __device__ ResidentBlock(const Rows& rows, const Task& task, int slot_bytes)
      : rows_(rows),
        task_(task),
        scratch_(reinterpret_cast<Scratch*>(shared_memory())),
        slot_{shared_memory() + kScratchBytes, scratch_->arrived,
              (slot_bytes + kTileBytes - 1) / kTileBytes},
        part_(cluster_rank()) {}

  __device__ void run() {
    slot_.init();
    // Pairs with the wait before the first row's entries: no block writes into one that has not
    // started.
    cluster_arrive();
    // The barriers have been set up.
    block_sync();
    const int stride = block_count() / rows_.parts;
    int n = skip_ignored(block_index() / rows_.parts, stride);
    if (n < rows_.count && is_first_warp()) slot_.load(slice(n));
    for (int parity = 0; n < rows_.count; parity ^= 1) {
      const int next = skip_ignored(n + stride, stride);
      finish_row(n, next, parity);
      n = next;
    }
    if (thread_index() == 0) bulk_wait_read<0>();
    // No block leaves while another may still read or write its entries.
    cluster_wait();
  }

 private:
  using Bits = typename Elements<kType>::Bits;

  __device__ static bool is_first_warp() { return thread_index() < kWarpSize; }

  __device__ Slice slice(int n) const { return slice_of(rows_, task_.gradient(), n, part_); }

  // The first row from n on that is in the loss; those before it get their zeros.
  __device__ int64_t skip_ignored(int n, int stride) const {
    for (; n < rows_.count && rows_.is_ignored(n); n += stride) {
      if (task_.writes_gradient()) write_zeros<Bits>(slice(n));
      if (part_ == 0 && thread_index() == 0) task_.skip(n);
    }
    return n;
  }

  __device__ void finish_row(int n, int next, int parity) {
    const Scaling scaling(rows_.scale.inv_temperature(n), rows_.scale.softcap);
    const Slice current = slice(n);
    const int target_column = rows_.target_in(part_, n);
    // Before the row's gradient may overwrite it.
    const float target = is_first_warp() ? target_logit<kType>(rows_, n) : 0.0f;
    const ThreadSums sums = sums_of<kType>(
        slot_, current, Part{rows_.columns_of(part_), target_column}, scaling, parity);
    exchange(join_warp<kType>(sums));
    const bool has_next = next < rows_.count;
    const bool only_reads = !task_.writes_gradient();
    if (only_reads && has_next && is_first_warp()) slot_.load(slice(next));
    if (is_first_warp()) {
      const OnlineSoftmax<double> others = join_entries(scratch_->entries, rows_.parts * kWarps);
      const bool writer = thread_index() == 0;
      const RowGrad grad =
          task_.finish(n, others, target_of(target, scaling), scaling.inv_temperature,
                       part_ == 0 && writer);
      if (writer) scratch_->grad = grad;
    }
    // Pairs with the wait before the next row's entries.
    cluster_arrive();
    block_sync();
    if (only_reads) return;
    const RowGrad grad = scratch_->grad;
    if (grad.is_zero) {
      write_zeros<Bits>(current);
      if (has_next && is_first_warp()) slot_.load(slice(next));
    } else if (grad.entropy_scale != 0.0f) {
      write_gradient<true>(current, grad, scaling, target_column, next);
    } else {
      write_gradient<false>(current, grad, scaling, target_column, next);
    }
  }

  // Hands this warp's entry to every block of the cluster and waits for theirs.
  __device__ void exchange(const Entry& entry) {
    cluster_wait();
    const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
    if (lane < rows_.parts) {
      Pack* to = reinterpret_cast<Pack*>(&scratch_->entries[part_ * kWarps + warp]);
      store_to_block(to, lane,
                     {{as_bits(entry.max), as_bits(entry.sum), as_bits(entry.weighted), 0}});
    }
    // Bulk loads may soon overwrite what this thread has read.
    fence_before_bulk();
    cluster_arrive();
    cluster_wait();
  }

  // Stores the gradient chunk by chunk and loads the next row behind it.
  template <bool kEntropy>
  __device__ void write_gradient(const Slice& current, const RowGrad& grad, const Scaling& scaling,
                                 int target_column, int next) {
    const bool loads = next < rows_.count;
    const Slice following = loads ? slice(next) : current;
    const int target_in_slot = current.lead / static_cast<int>(sizeof(Bits)) + target_column;
    for (int chunk = 0; chunk < slot_.num_chunks; ++chunk) {
      chunk_to_gradient<kType, kEntropy>(slot_.bytes, current, chunk, grad, scaling,
                                         target_column < 0 ? -kTileBytes : target_in_slot);
      fence_before_bulk();
      block_sync();
      if (!is_first_warp()) continue;
      slot_.store_chunk(current, chunk);
      if (loads && chunk > 0) {
        if (thread_index() == 0) bulk_wait_read<1>();
        warp_sync();
        slot_.load_chunk(following, chunk - 1);
      }
    }
    if (loads && is_first_warp()) {
      if (thread_index() == 0) bulk_wait_read<0>();
      warp_sync();
      slot_.load_chunk(following, slot_.num_chunks - 1);
    }
  }

  const Rows& rows_;
  const Task& task_;
  Scratch* scratch_;
  Slot<Bits> slot_;
  int part_;
};

#endif  // ONEPASS_HAS_CLUSTERS

// A cluster of `rows.parts` blocks takes every (clusters)th row.
template <DType kType, class Scaling, class Task>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    resident_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Task task,
                    int slot_bytes) {
#if ONEPASS_HAS_CLUSTERS
  ResidentBlock<kType, Scaling, Task>(rows, task, slot_bytes).run();
#endif
}

}  // namespace onepass
