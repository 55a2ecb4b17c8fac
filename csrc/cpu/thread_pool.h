// Persistent worker threads. A forked child starts its own; nothing runs at exit.
#pragma once

#include <cstdint>
#include <functional>

namespace onepass {

// Calls body(slot) on up to `threads` threads at once, slots 0 to threads - 1, slot 0 on the
// calling thread, and returns when all are done. `body` must not throw. A slot may be left out when
// another caller holds the pool, so work is handed out through WorkQueue, never by slot number.
void run_on_threads(int threads, const std::function<void(int slot)>& body);

}  // namespace onepass
