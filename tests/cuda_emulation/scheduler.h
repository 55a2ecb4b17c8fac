// Runs the threads of a CUDA launch as fibers, one at a time, in an order that a seed decides.
//
// A fiber runs until it waits for others: at a barrier, a warp operation, a bulk copy. Which fiber
// goes on, and when a bulk copy takes place, is drawn from the seed, so that a wait that a kernel
// lacks shows as a wrong result for some seed. Where all fibers wait and no copy is under way, the
// launch fails and says what they wait for.
//
// Each block has an operating-system thread, hence its own `thread_local` variables, which is what
// __shared__ stands for; a baton lets one of these threads run at a time.
#pragma once

#include <condition_variable>
#include <csetjmp>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};

struct Fiber;
struct Block;
class Launch;

// Threads meet here: the last of `expected` sets all of them free.
struct Meeting {
  unsigned arrived = 0;
  uint64_t round = 0;
  std::vector<Fiber*> waiting;
};

constexpr int kWarpSize = 32;

// What the lanes of a warp show each other. Rounds use the two halves by turns, since a lane may
// enter the next round before another has read.
struct WarpExchange {
  Meeting meeting;
  const char* operation[2] = {nullptr, nullptr};
  uint64_t shown[2][kWarpSize] = {};
};

struct Cluster {
  std::vector<Block*> blocks;
  Meeting barrier;
  unsigned blocks_left = 0;
};

struct Fiber {
  Block* block = nullptr;
  Dim3 thread;
  unsigned rank = 0;
  bool finished = false;
  const char* waits_for = nullptr;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  // Bulk stores: groups committed so far, and of each the copies that have not read yet.
  unsigned uncommitted = 0;
  std::vector<unsigned> unread_by_group;
  bool waits_for_reads = false;
  uint64_t cluster_round = 0;
  bool in_cluster_barrier = false;
  // Since the block's last barrier.
  bool fenced = false;
};

struct Block {
  Launch* launch = nullptr;
  // Told when its operating-system thread may run.
  std::condition_variable turn;
  Cluster* cluster = nullptr;
  Dim3 index;
  unsigned rank_in_cluster = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::deque<Fiber*> ready;
  unsigned unfinished = 0;
  Meeting barrier;
  // Whether all threads fenced before the barrier's last round.
  bool all_fenced = false;
  uint64_t noted_round = 0;
  // Copies to its shared memory that are under way.
  unsigned arriving = 0;
  std::map<std::pair<unsigned, unsigned>, WarpExchange> warps;  // by warp and mask
  std::vector<char> dynamic_shared;
  char* dynamic_base = nullptr;
  char* static_anchor = nullptr;
};

struct LaunchShape {
  Dim3 grid, block;
  unsigned cluster_size = 1;
  size_t dynamic_shared_bytes = 0;
};

// The fiber that runs now, and what CUDA tells it.
extern Fiber* current;
extern Dim3 threadIdx, blockIdx, gridDim, blockDim;

// Runs a launch to its end. Throws std::runtime_error where it cannot end.
void run_launch(const LaunchShape& shape, const std::function<void()>& kernel);

// Seeds the order of the launches that follow; 0 keeps the order of the threads.
void set_seed(uint64_t seed);

const LaunchShape& launch_shape();

// Waits until `expected` threads have come; `what` is named where they never do.
void meet(Meeting& meeting, unsigned expected, const char* what);

// Puts the running fiber to sleep; it goes on after `wake`.
void sleep(const char* what);
void wake(Fiber* fiber);

// Lets other fibers run first.
void yield(const char* what);

// Does `copy` at some later moment, at the latest when nothing else can go on.
void do_later(std::function<void()> copy);

// Stops the launch with a message; does not return.
[[noreturn]] void fail(const std::string& message);

// The address that `address`, in shared memory of the running block, has in another block of the
// cluster.
void* in_peer(const void* address, unsigned rank);

// Whether an address lies in the dynamic shared memory of a block.
bool in_dynamic_shared(const Block& block, const void* address, size_t bytes);

// Threads that wait for a phase of an mbarrier, by its address.
std::map<const void*, std::vector<Fiber*>>& mbarrier_sleepers();

}  // namespace emulation
