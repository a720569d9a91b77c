// Runs one thread block, or one pair of them, after another on a CPU: a fiber per thread, a round-robin scheduler, a
// deadlock detector. Threads of a pair are numbered through: those of its second block follow those of its first.
// A thread that must wait names the condition; the scheduler resumes it when the condition holds. When no thread can
// run and no copy is under way the block is dead, and the run fails with what everybody waits for.
#pragma once

#include <stdint.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace m1::emulator {

constexpr int kWarpThreads = 32;
constexpr int kGroupThreads = 128;
constexpr size_t kStackBytes = 96 * 1024;
constexpr uint32_t kSharedBytes = 232448;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::function<bool()> ready;
  const char* waits_for = "";
  bool done = false;
};

// What threads of one warp, or of one warpgroup, leave for the last of them to act upon.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
  const char* operation = "";
};

struct Engine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int current = 0;
  int num_threads = 0;  // of all blocks that run together
  int block_threads = 0;
  uint32_t first_block = 0, num_blocks = 0;
  std::function<void()> body;
  std::function<bool()> deliver;
  std::string error;
  std::vector<Meeting> warps;
  std::map<uint32_t, Meeting> named[2];
  Meeting pair;
};

inline Engine& engine() {
  static Engine instance;
  return instance;
}

// Which of the blocks that run together a thread belongs to.
inline int rank_of(int thread) { return thread / engine().block_threads; }
inline int own_rank() { return rank_of(engine().current); }

// Stops the run: the scheduler returns, nobody is resumed. Only the first failure is kept.
inline void fail(const std::string& message) {
  Engine& e = engine();
  char place[96];
  const int rank = e.current < 0 ? 0 : own_rank();
  snprintf(place, sizeof place, " [block %u thread %d]", e.first_block + uint32_t(rank),
           e.current - rank * e.block_threads);
  if (e.error.empty()) e.error = message + place;
  if (e.current >= 0) swapcontext(&e.fibers[e.current].context, &e.scheduler);
}

inline void wait_until(const char* what, std::function<bool()> ready) {
  Engine& e = engine();
  if (ready()) return;
  Fiber& self = e.fibers[e.current];
  self.ready = std::move(ready);
  self.waits_for = what;
  swapcontext(&self.context, &e.scheduler);
  self.ready = nullptr;
}

// All `members` threads of a meeting call this; the last runs `act`, then all go on.
inline void meet(Meeting& meeting, int members, const char* operation, const std::function<void()>& act) {
  if (meeting.arrived == 0) meeting.operation = operation;
  if (strcmp(meeting.operation, operation) != 0)
    fail(std::string("threads diverge: ") + operation + " meets " + meeting.operation);
  if (++meeting.arrived == members) {
    act();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  const uint64_t generation = meeting.generation;
  wait_until(operation, [&meeting, generation] { return meeting.generation != generation; });
}

inline Meeting& own_warp() { return engine().warps[engine().current / kWarpThreads]; }

inline void fiber_main() {
  Engine& e = engine();
  e.body();
  e.fibers[e.current].done = true;
  swapcontext(&e.fibers[e.current].context, &e.scheduler);
}

inline std::string describe_deadlock() {
  std::map<std::string, int> reasons;
  for (const Fiber& fiber : engine().fibers)
    if (!fiber.done) ++reasons[fiber.waits_for];
  std::string text = "deadlock:";
  for (const auto& [reason, count] : reasons) text += " " + std::to_string(count) + " threads in " + reason + ";";
  return text;
}

inline bool has_ended(int rank) {
  const Engine& e = engine();
  for (int thread = rank * e.block_threads; thread < (rank + 1) * e.block_threads; ++thread)
    if (!e.fibers[thread].done) return false;
  return true;
}

// Blocks of a pair drift apart: each rests for 256 rounds in 1024, the second from the start. -1: nobody rests.
inline int resting_block(uint64_t round) {
  constexpr int kWhoRests[4] = {1, -1, 0, -1};
  return engine().num_threads > engine().block_threads ? kWhoRests[round / 256 % 4] : -1;
}

// Resumes whoever is ready until all threads are done, one fails, or nobody can go on.
inline void schedule() {
  Engine& e = engine();
  uint64_t round = 0;
  bool progress = true;
  for (int left = e.num_threads; left > 0; ++round) {
    // Who rests is needed after all when the other cannot go on.
    const int resting = progress ? resting_block(round) : -1;
    progress = false;
    for (int thread = 0; thread < e.num_threads; ++thread) {
      Fiber& fiber = e.fibers[thread];
      if (rank_of(thread) == resting || fiber.done || (fiber.ready && !fiber.ready())) continue;
      progress = true;
      e.current = thread;
      swapcontext(&e.scheduler, &fiber.context);
      e.current = -1;
      if (!e.error.empty()) return;
      left -= fiber.done;
    }
    progress |= e.deliver();
    if (!e.error.empty()) return;
    if (!progress && resting < 0) return fail(describe_deadlock());
  }
}

// Runs `blocks` blocks, one or two, that live at the same time.
inline void run_blocks(uint32_t first_block, int blocks, int block_threads, const std::function<void()>& body) {
  Engine& e = engine();
  const int threads = blocks * block_threads;
  e.first_block = first_block;
  e.num_threads = threads;
  e.block_threads = block_threads;
  e.body = body;
  e.current = -1;
  e.warps.assign(threads / kWarpThreads, Meeting());
  for (auto& named : e.named) named.clear();
  e.pair = Meeting();
  e.fibers.resize(threads);
  for (Fiber& fiber : e.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.done = false;
    fiber.ready = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  schedule();
}

}  // namespace m1::emulator
