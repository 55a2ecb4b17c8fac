// One read and one write: a row stays in the shared memory of a cluster of blocks, one part in each,
// between its statistics and its gradient.
//
// A block owns one slot, large enough for its part, in chunks of 16 KiB with a barrier each. Sums
// are taken of a chunk as soon as it has arrived; each block sends its own, 16 bytes, to the others;
// every block joins them in the same order and computes the token loss itself, which costs less than
// sending it round. The gradient of a chunk is computed in place and stored in bulk, and as
// soon as the store has read it the same chunk of the next row is loaded into its place: reads and
// writes of memory overlap inside a block, and the more so between the (up to three) blocks of a
// multiprocessor.
//
// Addresses that are not a multiple of 16 only shift the row in its slot by `lead` bytes. Its first
// and last bytes that share 16 with a neighbour are copied by plain loads and stores.
#pragma once

#include "row_slices.cuh"
#include "row_tasks.cuh"

namespace onepass {

constexpr int kMaxChunks = 15;  // of the 227 KiB that a block can have

// The start of a block's shared memory; its slot follows.
struct Scratch {
  Sums of_warps[kWarps];
  // Of two rows in turn: a block that is ahead sends those of its next row.
  Sums of_blocks[2][kMaxParts];
  float target;
  RowGrad grad;
  Barrier exchanged[2];
  Barrier arrived[kMaxChunks];
};
static_assert(sizeof(Scratch) <= kScratchBytes, "the slot starts behind it");

#if ONEPASS_HAS_CLUSTERS

// The slot of a block. Loads and stores are made by its first warp.
template <class Bits>
struct Slot {
  char* bytes;
  Barrier* arrived;
  int num_chunks;

  // Every chunk of every row is loaded, empty or not, so that all barriers keep the same parity.
  __device__ void load_chunk(const Slice& slice, int chunk) const {
    const int begin = chunk * kTileBytes, end = begin + kTileBytes;
    for_loose_elements<Bits>(slice, begin, end, [&](int at) {
      *reinterpret_cast<Bits*>(bytes + at) =
          *reinterpret_cast<const Bits*>(slice.from + (at - slice.lead));
      // The next row may have a bulk load here.
      fence_before_bulk();
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
__device__ Sums sums_of(const Slot<Bits>& slot, const Slice& slice, const Part& part,
                              const Scaling& scaling, int parity) {
  Sums sums;
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
    if (thread_index() == 0) init_barriers();
    // No block sends to one that has not set up its barriers.
    cluster_arrive();
    cluster_wait();
    const int stride = block_count() / rows_.parts;
    int n = skip_ignored(block_index() / rows_.parts, stride);
    if (n < rows_.count && is_first_warp()) slot_.load(slice(n));
    for (int turn = 0; n < rows_.count; ++turn) {
      const int next = skip_ignored(n + stride, stride);
      finish_row(n, next, turn);
      n = next;
    }
    // Its shared memory outlives every bulk store that reads it, and the block every send to it.
    if (thread_index() == 0) bulk_wait_read<0>();
    cluster_arrive();
    cluster_wait();
  }

 private:
  using Bits = typename Elements<kType>::Bits;

  __device__ static bool is_first_warp() { return warp_index() == 0; }

  __device__ Slice slice(int n) const {
    const int64_t skipped = int64_t{part_} * rows_.part_columns * int64_t{sizeof(Bits)};
    const LogitsView& grad = task_.gradient();
    char* to = grad.data ? row_of(grad, n) + skipped : nullptr;
    return slice_at(row_of(rows_.logits, n) + skipped, to,
                    rows_.columns_of(part_) * int{sizeof(Bits)});
  }

  // The first row from n on that is in the loss; those before it get their zeros.
  __device__ int64_t skip_ignored(int n, int stride) const {
    for (; n < rows_.count && rows_.is_ignored(n); n += stride) {
      if (task_.writes_gradient()) write_zeros<Bits>(slice(n));
      if (part_ == 0 && thread_index() == 0) task_.skip(n);
    }
    return n;
  }

  __device__ void init_barriers() const {
    barrier_init(&scratch_->exchanged[0], 1);
    barrier_init(&scratch_->exchanged[1], 1);
#pragma unroll 1
    for (int k = 0; k < slot_.num_chunks; ++k) barrier_init(&slot_.arrived[k], 1);
    publish_barriers();
  }

  __device__ Scaling scaling(int n) const {
    return Scaling(rows_.scale.inv_temperature(n), rows_.scale.softcap);
  }

  __device__ void finish_row(int n, int next, int turn) {
    sum_row(n, turn);
    block_sync();
    const bool only_reads = !task_.writes_gradient();
    if (is_first_warp()) {
      send(join(scratch_->of_warps, kWarps), turn);
      if (only_reads && next < rows_.count) slot_.load(slice(next));
      const RowGrad grad = row_loss(n, receive(turn));
      if (thread_index() == 0) scratch_->grad = grad;
    }
    block_sync();
    if (only_reads) return;
    const RowGrad grad = scratch_->grad;
    if (grad.is_zero) {
      write_zeros<Bits>(slice(n));
      if (next < rows_.count && is_first_warp()) slot_.load(slice(next));
    } else if (grad.entropy_scale != 0.0f) {
      write_gradient<true>(n, grad, next);
    } else {
      write_gradient<false>(n, grad, next);
    }
  }

  __device__ void sum_row(int n, int turn) const {
    // Before the row's gradient may overwrite it.
    if (thread_index() == 0) scratch_->target = target_logit<kType>(rows_, n);
    const Part part = {rows_.columns_of(part_), rows_.target_in(part_, n)};
    const Sums sums = join_lanes(sums_of<kType>(slot_, slice(n), part, scaling(n), turn % 2));
    if (lane_index() == 0) scratch_->of_warps[warp_index()] = sums;
  }

  __device__ RowGrad row_loss(int n, const Sums& others) const {
    const Scaling scaling = this->scaling(n);
    return task_.finish(n, others, target_of(scratch_->target, scaling), scaling.inv_temperature,
                        thread_index() == 0 && part_ == 0);
  }

  // Hands the sums of this block to all blocks of the cluster. That the buffer is free follows from
  // the sums of the row between, which a block sends after it has joined those of the row before.
  __device__ void send(const Sums& sums, int turn) const {
    Barrier* exchanged = &scratch_->exchanged[turn % 2];
    const int lane = lane_index();
    if (lane == 0) barrier_arrive_expecting(exchanged, rows_.parts * int{sizeof(Sums)});
    if (lane >= rows_.parts) return;
    Pack* to = reinterpret_cast<Pack*>(&scratch_->of_blocks[turn % 2][part_]);
    send_to_block(to, lane, {{as_bits(sums.max), as_bits(sums.sum), as_bits(sums.weighted), 0}},
                  exchanged);
  }

  // The sums of the whole row.
  __device__ Sums receive(int turn) const {
    barrier_wait_for_cluster(&scratch_->exchanged[turn % 2], turn / 2 % 2);
    return join(scratch_->of_blocks[turn % 2], rows_.parts);
  }

  // Stores the gradient chunk by chunk and loads the next row behind it.
  template <bool kEntropy>
  __device__ void write_gradient(int n, const RowGrad& grad, int next) const {
    const bool loads = next < rows_.count;
    const Slice current = slice(n), following = loads ? slice(next) : current;
    const Scaling scaling = this->scaling(n);
    const int target = rows_.target_in(part_, n);
    const int target_in_slot =
        target < 0 ? -kTileBytes : current.lead / static_cast<int>(sizeof(Bits)) + target;
    for (int chunk = 0; chunk < slot_.num_chunks; ++chunk) {
      chunk_to_gradient<kType, kEntropy>(slot_.bytes, current, chunk, grad, scaling,
                                         target_in_slot);
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
__global__ void __launch_bounds__(kThreads, Scaling::kBlocks)
    resident_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Task task,
                    int slot_bytes) {
#if ONEPASS_HAS_CLUSTERS
  ResidentBlock<kType, Scaling, Task>(rows, task, slot_bytes).run();
#endif
}

}  // namespace onepass
