#include "thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace onepass {
namespace {

class ThreadPool {
 public:
  void run(int threads, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return body(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (num_workers_ < threads - 1) {
        const int slot = ++num_workers_;
        std::thread([this, slot, seen = generation_] { serve(slot, seen); }).detach();
      }
      body_ = &body;
      active_workers_ = running_ = threads - 1;
      ++generation_;
    }
    start_.notify_all();
    body(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve(int slot, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (slot > active_workers_) continue;
      const std::function<void(int)>& body = *body_;
      lock.unlock();
      body(slot);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // one caller at a time; others run alone
  std::mutex mutex_;  // everything below
  std::condition_variable start_, done_;
  const std::function<void(int)>* body_ = nullptr;
  uint64_t generation_ = 0;
  int num_workers_ = 0;
  int active_workers_ = 0;
  int running_ = 0;
};

// Never destroyed: workers wait on it until the process ends.
std::atomic<ThreadPool*> pool{nullptr};
// OpenMP's threads do not outlive a fork, and its library does not notice.
std::atomic<bool> forked{false};

void forget_pool() {
  pool.store(nullptr);
  forked.store(true);
}

// When the module is loaded: a parent that has used OpenMP without us may fork before it calls us.
[[maybe_unused]] const int kRegistered = pthread_atfork(nullptr, nullptr, forget_pool);

ThreadPool& the_pool() {
  ThreadPool* current = pool.load();
  if (!current) {
    ThreadPool* fresh = new ThreadPool;
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

// The OpenMP library that PyTorch has loaded. Its threads spin for a while after each operator, on
// the cores that threads of our own would need; as our workers they are ready at once.
struct OpenMp {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using ThreadNumber = int (*)();

  Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  ThreadNumber thread_number =
      reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));

  bool found() const { return parallel && thread_number; }
};

const OpenMp& openmp() {
  static const OpenMp library;
  return library;
}

void call_body(void* body) {
  (*static_cast<const std::function<void(int)>*>(body))(openmp().thread_number());
}

}  // namespace

void run_on_threads(int threads, const std::function<void(int)>& body) {
  if (threads <= 1) return body(0);
  if (!openmp().found() || forked.load()) return the_pool().run(threads, body);
  openmp().parallel(call_body, const_cast<std::function<void(int)>*>(&body),
                    static_cast<unsigned>(threads), 0);
}

}  // namespace onepass
