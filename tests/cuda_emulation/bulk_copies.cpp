#include "bulk_copies.h"

#include <cstring>

namespace emulation {

namespace {

constexpr uint8_t kInitialised = 0xb5;
constexpr int kBulkAlignment = 16;

struct BarrierState {
  uint8_t mark;
  uint8_t phase;
  uint8_t arrivals;
  uint8_t missing;
  int32_t bytes;
};
static_assert(sizeof(BarrierState) == sizeof(uint64_t));

BarrierState load(const uint64_t* barrier) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof(state));
  if (state.mark != kInitialised) fail("an mbarrier is used that was not initialised");
  return state;
}

void store(uint64_t* barrier, BarrierState state) {
  if (state.missing == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.missing = state.arrivals;
    std::vector<Fiber*> sleepers;
    sleepers.swap(mbarrier_sleepers()[barrier]);
    for (Fiber* fiber : sleepers) wake(fiber);
  }
  std::memcpy(barrier, &state, sizeof(state));
}

void arrived(uint64_t* barrier, int bytes) {
  BarrierState state = load(barrier);
  state.bytes -= bytes;
  store(barrier, state);
}

void check_copy(const void* shared, const void* global, int bytes) {
  if (bytes <= 0 || bytes % kBulkAlignment || reinterpret_cast<uintptr_t>(shared) % kBulkAlignment ||
      reinterpret_cast<uintptr_t>(global) % kBulkAlignment) {
    fail("a bulk copy whose addresses and size are not positive multiples of 16 bytes");
  }
  if (!in_dynamic_shared(*current->block, shared, static_cast<size_t>(bytes))) {
    fail("a bulk copy beyond the dynamic shared memory of its block");
  }
}

}  // namespace

void cluster_arrive() {
  if (current->in_cluster_barrier) fail("cluster_arrive: a second time before cluster_wait");
  current->in_cluster_barrier = true;
  Meeting& barrier = current->block->cluster->barrier;
  current->cluster_round = barrier.round;
  if (++barrier.arrived < launch_shape().cluster_size * launch_shape().block.count()) return;
  barrier.arrived = 0;
  ++barrier.round;
  std::vector<Fiber*> waiting;
  waiting.swap(barrier.waiting);
  for (Fiber* fiber : waiting) wake(fiber);
}

void cluster_wait() {
  if (!current->in_cluster_barrier) fail("cluster_wait: without cluster_arrive");
  Meeting& barrier = current->block->cluster->barrier;
  if (barrier.round == current->cluster_round) {
    barrier.waiting.push_back(current);
    sleep("the cluster barrier");
  }
  current->in_cluster_barrier = false;
}

void barrier_init(uint64_t* barrier, int arrivals) {
  const BarrierState state = {kInitialised, 0, static_cast<uint8_t>(arrivals),
                              static_cast<uint8_t>(arrivals), 0};
  std::memcpy(barrier, &state, sizeof(state));
}

void barrier_arrive(uint64_t* barrier, int expected_bytes) {
  BarrierState state = load(barrier);
  if (state.missing == 0) fail("an mbarrier has more arrivals than it was initialised for");
  --state.missing;
  state.bytes += expected_bytes;
  store(barrier, state);
}

void barrier_wait(uint64_t* barrier, int parity) {
  while (load(barrier).phase == parity) {
    mbarrier_sleepers()[barrier].push_back(current);
    sleep("an mbarrier");
  }
}

void send_to_block(void* shared, int rank, const void* from, int bytes, uint64_t* barrier) {
  if (!in_dynamic_shared(*current->block, shared, static_cast<size_t>(bytes))) {
    fail("a send beyond the dynamic shared memory of a block");
  }
  void* to = in_peer(shared, static_cast<unsigned>(rank));
  uint64_t* counting = static_cast<uint64_t*>(in_peer(barrier, static_cast<unsigned>(rank)));
  Block* receiver = current->block->cluster->blocks[static_cast<size_t>(rank)];
  const char* first = static_cast<const char*>(from);
  const std::vector<char> sent(first, first + bytes);
  ++receiver->arriving;
  do_later([=] {
    std::memcpy(to, sent.data(), sent.size());
    --receiver->arriving;
    arrived(counting, bytes);
  });
}

void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  check_copy(shared, global, bytes);
  Block* block = current->block;
  ++block->arriving;
  do_later([=] {
    std::memcpy(shared, global, static_cast<size_t>(bytes));
    --block->arriving;
    arrived(barrier, bytes);
  });
}

void bulk_store(void* global, const void* shared, int bytes) {
  check_copy(shared, global, bytes);
  if (!current->block->all_fenced) {
    fail("a bulk store of shared memory that a thread did not fence before the last block barrier");
  }
  Fiber* issuer = current;
  const size_t group = issuer->unread_by_group.size();
  ++issuer->uncommitted;
  do_later([=] {
    std::memcpy(global, shared, static_cast<size_t>(bytes));
    const bool open = group == issuer->unread_by_group.size();
    --(open ? issuer->uncommitted : issuer->unread_by_group[group]);
    if (issuer->waits_for_reads) {
      issuer->waits_for_reads = false;
      wake(issuer);
    }
  });
}

void bulk_close_group() {
  current->unread_by_group.push_back(current->uncommitted);
  current->uncommitted = 0;
}

void bulk_wait_read(int pending) {
  Fiber* self = current;
  const auto any_unread = [&] {
    const size_t groups = self->unread_by_group.size();
    for (size_t i = 0; i + static_cast<size_t>(pending) < groups; ++i) {
      if (self->unread_by_group[i] > 0) return true;
    }
    return false;
  };
  while (any_unread()) {
    self->waits_for_reads = true;
    sleep("bulk stores to read shared memory");
  }
}

void note_sync() {
  Block& block = *current->block;
  if (block.noted_round == block.barrier.round) return;
  block.noted_round = block.barrier.round;
  block.all_fenced = true;
  for (const auto& fiber : block.fibers) {
    block.all_fenced = block.all_fenced && fiber->fenced;
    fiber->fenced = false;
  }
}

}  // namespace emulation
