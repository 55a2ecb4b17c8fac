// Barriers that bulk copies complete, bulk copies, and the barrier of a cluster.
#pragma once

#include "scheduler.h"

namespace emulation {

void cluster_arrive();
void cluster_wait();

// A barrier in 8 bytes of shared memory: `arrivals` threads and some bytes end a phase.
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int expected_bytes);
void barrier_wait(uint64_t* barrier, int parity);

// Writes to where `shared` lies in block `rank` of the cluster, counted on its `barrier`.
void send_to_block(void* shared, int rank, const void* from, int bytes, uint64_t* barrier);

void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier);
void bulk_store(void* global, const void* shared, int bytes);
void bulk_close_group();
void bulk_wait_read(int pending);

// After a barrier of the block: what all threads fenced before it may be stored in bulk.
void note_sync();

}  // namespace emulation
