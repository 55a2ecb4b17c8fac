#include "scheduler.h"

#include <ucontext.h>

#include <cstring>
#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

namespace emulation {

Fiber* current = nullptr;
Dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace {

constexpr size_t kStackBytes = 64 << 10;
// Blocks of this many clusters are under way at a time, as on a device with few multiprocessors.
constexpr unsigned kResidentClusters = 3;
// What is never written holds a NaN in every float format.
constexpr char kUnwritten = '\xff';
constexpr size_t kGuardBytes = 256;
// Of so many scheduling steps one goes to another block.
constexpr unsigned kBlockSwitch = 16;
// Yields without anything else happening that mean that nothing ever will.
constexpr unsigned kMostIdleYields = 1 << 20;

uint64_t launch_seed = 0;
Launch* active = nullptr;
std::map<const void*, std::vector<Fiber*>> sleepers;
// Stacks of fibers that have ended: mapping memory anew takes longer than most kernels.
std::vector<std::unique_ptr<char[]>> spare_stacks;
thread_local char static_anchor;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace

enum class Order { kInTurn, kLastFirst, kRandom };
enum class CopyMoment { kAtOnce, kAtLast, kRandom };

class Launch {
 public:
  Launch(const LaunchShape& shape, const std::function<void()>& kernel)
      : shape(shape), kernel(kernel), random_(launch_seed) {
    if (launch_seed != 0) {
      order_ = static_cast<Order>(random_() % 3);
      copies_ = static_cast<CopyMoment>(random_() % 3);
    }
    const unsigned blocks = shape.grid.count();
    if (blocks % shape.cluster_size) throw Failure("grid: expected whole clusters");
    clusters_left_to_start_ = blocks / shape.cluster_size;
    for (unsigned i = 0; i < kResidentClusters && clusters_left_to_start_ > 0; ++i) start_cluster();
  }

  void run() {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      holder_ = blocks_.front().get();
      holder_->turn.notify_one();
      over_.wait(lock, [&] { return ended_; });
    }
    for (std::thread& thread : threads_) thread.join();
    if (!failure_.empty()) throw Failure(failure_);
  }

  void fail(const std::string& message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_.empty()) failure_ = message;
    end();
  }

  void do_later(std::function<void()> copy) {
    if (copies_ == CopyMoment::kAtOnce) return copy();
    copies_under_way_.push_back(std::move(copy));
  }

  void note_progress() { idle_yields_ = 0; }

  // The running fiber steps behind all others, those of other blocks too.
  void step_back(const char* what) {
    if (++idle_yields_ > kMostIdleYields) {
      throw Failure(std::string("nothing happens any more, while threads poll: ") + what);
    }
    std::deque<Fiber*>& ready = current->block->ready;
    ready.insert(order_ == Order::kLastFirst ? ready.begin() : ready.end(), current);
    stepped_back_ = true;
  }

  const LaunchShape shape;
  const std::function<void()>& kernel;
  jmp_buf* home = nullptr;

 private:
  void start_cluster() {
    --clusters_left_to_start_;
    clusters_.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters_.back();
    for (unsigned rank = 0; rank < shape.cluster_size; ++rank) {
      blocks_.push_back(std::make_unique<Block>());
      Block& block = *blocks_.back();
      block.launch = this;
      block.cluster = &cluster;
      const unsigned number = next_block_++;
      block.index = {number % shape.grid.x, number / shape.grid.x % shape.grid.y,
                     number / shape.grid.x / shape.grid.y};
      block.rank_in_cluster = rank;
      prepare_shared(block);
      prepare_fibers(block);
      cluster.blocks.push_back(&block);
      ++cluster.blocks_left;
      resident_.push_back(&block);
    }
    for (Block* block : cluster.blocks) threads_.emplace_back([this, block] { serve(*block); });
  }

  void prepare_shared(Block& block) {
    constexpr size_t kAlignment = 1024;
    block.dynamic_shared.assign(shape.dynamic_shared_bytes + kAlignment + 2 * kGuardBytes,
                                kUnwritten);
    const uintptr_t start = reinterpret_cast<uintptr_t>(block.dynamic_shared.data()) + kGuardBytes;
    block.dynamic_base =
        reinterpret_cast<char*>((start + kAlignment - 1) / kAlignment * kAlignment);
  }

  void check_end(const Block& block) const {
    if (block.arriving > 0) throw Failure("a block ended before all that it was sent had arrived");
    for (const auto& fiber : block.fibers) {
      for (unsigned unread : fiber->unread_by_group) {
        if (unread > 0) throw Failure("a block ended before its bulk store had read");
      }
      if (fiber->uncommitted > 0) throw Failure("a bulk store was not committed to a group");
    }
    for (size_t i = 0; i < kGuardBytes; ++i) {
      const char after = block.dynamic_base[shape.dynamic_shared_bytes + i];
      const char before = block.dynamic_base[-1 - static_cast<ptrdiff_t>(i)];
      if (after != kUnwritten || before != kUnwritten) {
        throw Failure("a write beyond the dynamic shared memory of block " +
                      std::to_string(block.index.x));
      }
    }
  }

  void prepare_fibers(Block& block) {
    const unsigned count = shape.block.count();
    block.unfinished = count;
    for (unsigned rank = 0; rank < count; ++rank) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = &block;
      fiber->rank = rank;
      fiber->thread = {rank % shape.block.x, rank / shape.block.x % shape.block.y,
                       rank / shape.block.x / shape.block.y};
      if (spare_stacks.empty()) spare_stacks.emplace_back(new char[kStackBytes]);
      fiber->stack = std::move(spare_stacks.back());
      spare_stacks.pop_back();
      block.ready.push_back(fiber.get());
      block.fibers.push_back(std::move(fiber));
    }
  }

  // The loop of a block's operating-system thread.
  void serve(Block& block) {
    block.static_anchor = &static_anchor;
    if (!wait_for_baton(block)) return;
    try {
      enter_fibers(block);
      while (block.unfinished > 0) {
        Fiber* next = choose(block);
        if (next == nullptr) return;
        resume(*next);
      }
      check_end(block);
      leave(block);
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }

  // Gives each fiber a stack of its own; it stops at once and waits to be resumed.
  void enter_fibers(Block& block) {
    for (auto& fiber : block.fibers) {
      ucontext_t here, there;
      getcontext(&there);
      there.uc_stack.ss_sp = fiber->stack.get();
      there.uc_stack.ss_size = kStackBytes;
      there.uc_link = nullptr;
      current = fiber.get();
      jmp_buf back;
      home = &back;
      makecontext(&there, reinterpret_cast<void (*)()>(&Launch::fiber_main), 0);
      if (_setjmp(back) == 0) swapcontext(&here, &there);
    }
  }

  static void fiber_main() {
    Fiber* self = current;
    Launch& launch = *self->block->launch;
    if (_setjmp(self->state) == 0) _longjmp(*launch.home, 1);
    try {
      launch.kernel();
    } catch (const std::exception& error) {
      launch.fiber_failure_ = std::current_exception();
    }
    self->finished = true;
    --self->block->unfinished;
    launch.note_progress();
    _longjmp(*launch.home, 1);
  }

  void resume(Fiber& fiber) {
    jmp_buf back;
    home = &back;
    current = &fiber;
    threadIdx = fiber.thread;
    blockIdx = fiber.block->index;
    gridDim = shape.grid;
    blockDim = shape.block;
    fiber.waits_for = nullptr;
    if (_setjmp(back) == 0) _longjmp(fiber.state, 1);
    if (fiber_failure_) std::rethrow_exception(std::exchange(fiber_failure_, nullptr));
  }

  bool wait_for_baton(Block& block) {
    std::unique_lock<std::mutex> lock(mutex_);
    block.turn.wait(lock, [&] { return ended_ || holder_ == &block; });
    return !ended_;
  }

  // The fiber of this block that goes on, after other blocks had their turns; null where the launch
  // has failed.
  Fiber* choose(Block& block) {
    while (true) {
      move_copies();
      Block* next = choose_block(block);
      if (next == &block) return take(block);
      hand_over(*next);
      if (!wait_for_baton(block)) return nullptr;
    }
  }

  void move_copies() {
    if (copies_under_way_.empty()) return;
    const bool now = copies_ == CopyMoment::kRandom && random_() % 8 == 0;
    if (now || !anyone_ready()) move_one_copy();
  }

  void move_one_copy() {
    const size_t which = random_() % copies_under_way_.size();
    std::function<void()> copy = std::move(copies_under_way_[which]);
    copies_under_way_[which] = std::move(copies_under_way_.back());
    copies_under_way_.pop_back();
    note_progress();
    copy();
  }

  bool anyone_ready() const {
    for (const Block* block : resident_) {
      if (!block->ready.empty()) return true;
    }
    return false;
  }

  Block* choose_block(Block& block) {
    while (!anyone_ready()) {
      if (copies_under_way_.empty()) throw Failure(deadlock_report());
      move_one_copy();
    }
    const bool moves = std::exchange(stepped_back_, false) || random_() % kBlockSwitch == 0;
    if (!moves && !block.ready.empty()) return &block;
    const size_t first = random_() % resident_.size();
    for (size_t i = 0;; ++i) {
      Block* other = resident_[(first + i) % resident_.size()];
      if (!other->ready.empty()) return other;
    }
  }

  Fiber* take(Block& block) {
    std::deque<Fiber*>& ready = block.ready;
    if (order_ == Order::kRandom) std::swap(ready.front(), ready[random_() % ready.size()]);
    const bool last = order_ == Order::kLastFirst;
    Fiber* fiber = last ? ready.back() : ready.front();
    last ? ready.pop_back() : ready.pop_front();
    return fiber;
  }

  void hand_over(Block& next) {
    std::lock_guard<std::mutex> lock(mutex_);
    holder_ = &next;
    next.turn.notify_one();
  }

  // A block has ended: the next cluster starts once all blocks of its own have.
  void leave(Block& block) {
    for (size_t i = 0; i < resident_.size(); ++i) {
      if (resident_[i] == &block) resident_.erase(resident_.begin() + static_cast<ptrdiff_t>(i));
    }
    for (auto& fiber : block.fibers) spare_stacks.push_back(std::move(fiber->stack));
    std::vector<char>().swap(block.dynamic_shared);
    if (--block.cluster->blocks_left == 0 && clusters_left_to_start_ > 0) start_cluster();
    if (!resident_.empty()) return hand_over(*choose_block(block));
    while (!copies_under_way_.empty()) move_one_copy();
    std::lock_guard<std::mutex> lock(mutex_);
    end();
  }

  void end() {
    ended_ = true;
    over_.notify_all();
    for (auto& block : blocks_) block->turn.notify_all();
  }

  std::string deadlock_report() const {
    std::map<std::string, unsigned> waiting;
    for (const Block* block : resident_) {
      for (const auto& fiber : block->fibers) {
        const char* what = fiber->finished ? "nothing, they have ended" : fiber->waits_for;
        ++waiting["block " + std::to_string(block->index.x) + " wait for " + what];
      }
    }
    std::ostringstream report;
    report << "deadlock:";
    for (const auto& [what, count] : waiting) report << ' ' << count << " threads of " << what << ';';
    return report.str();
  }

  std::mutex mutex_;
  std::condition_variable over_;
  Block* holder_ = nullptr;
  bool ended_ = false;
  std::string failure_;
  std::exception_ptr fiber_failure_;
  std::mt19937_64 random_;
  Order order_ = Order::kInTurn;
  CopyMoment copies_ = CopyMoment::kAtOnce;
  unsigned clusters_left_to_start_ = 0;
  unsigned next_block_ = 0;
  unsigned idle_yields_ = 0;
  bool stepped_back_ = false;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Block*> resident_;
  std::vector<std::thread> threads_;
  std::vector<std::function<void()>> copies_under_way_;
};

void run_launch(const LaunchShape& shape, const std::function<void()>& kernel) {
  Launch launch(shape, kernel);
  active = &launch;
  sleepers.clear();
  try {
    launch.run();
  } catch (...) {
    active = nullptr;
    throw;
  }
  active = nullptr;
}

void set_seed(uint64_t seed) { launch_seed = seed; }

const LaunchShape& launch_shape() { return active->shape; }

void sleep(const char* what) {
  Fiber* self = current;
  self->waits_for = what;
  if (_setjmp(self->state) == 0) _longjmp(*active->home, 1);
}

void wake(Fiber* fiber) {
  active->note_progress();
  fiber->block->ready.push_back(fiber);
}

void yield(const char* what) {
  active->step_back(what);
  sleep(what);
}

void meet(Meeting& meeting, unsigned expected, const char* what) {
  if (++meeting.arrived < expected) {
    meeting.waiting.push_back(current);
    return sleep(what);
  }
  meeting.arrived = 0;
  ++meeting.round;
  std::vector<Fiber*> waiting;
  waiting.swap(meeting.waiting);
  for (Fiber* fiber : waiting) wake(fiber);
  // The last to arrive has no right to go on first.
  wake(current);
  sleep(what);
}

void do_later(std::function<void()> copy) { active->do_later(std::move(copy)); }

void fail(const std::string& message) { throw Failure(message); }

void* in_peer(const void* address, unsigned rank) {
  const Block& own = *current->block;
  if (rank >= own.cluster->blocks.size()) {
    fail("cluster rank: expected below " + std::to_string(own.cluster->blocks.size()) + ", got " +
         std::to_string(rank));
  }
  const Block& peer = *own.cluster->blocks[rank];
  if (peer.unfinished == 0) fail("shared memory of a block of the cluster that has ended");
  const char* byte = static_cast<const char*>(address);
  if (in_dynamic_shared(own, address, 1)) return peer.dynamic_base + (byte - own.dynamic_base);
  return peer.static_anchor + (byte - own.static_anchor);
}

bool in_dynamic_shared(const Block& block, const void* address, size_t bytes) {
  const char* byte = static_cast<const char*>(address);
  const size_t size = block.launch->shape.dynamic_shared_bytes;
  return byte >= block.dynamic_base && byte + bytes <= block.dynamic_base + size;
}

std::map<const void*, std::vector<Fiber*>>& mbarrier_sleepers() { return sleepers; }

}  // namespace emulation
