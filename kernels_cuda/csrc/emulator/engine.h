// Runs one thread block after another on a CPU: a fiber per thread, a round-robin scheduler, a deadlock detector.
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
  int num_threads = 0;
  uint32_t block = 0, num_blocks = 0;
  std::function<void()> body;
  std::function<bool()> deliver;
  std::string error;
  std::vector<Meeting> warps;
  std::map<uint32_t, Meeting> named;
};

inline Engine& engine() {
  static Engine instance;
  return instance;
}

// Stops the run: the scheduler returns, nobody is resumed. Only the first failure is kept.
inline void fail(const std::string& message) {
  Engine& e = engine();
  char place[96];
  snprintf(place, sizeof place, " [block %u thread %d]", e.block, e.current);
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

// Resumes whoever is ready until all threads are done, one fails, or nobody can go on.
inline void schedule() {
  Engine& e = engine();
  for (int left = e.num_threads; left > 0;) {
    bool progress = false;
    for (int thread = 0; thread < e.num_threads; ++thread) {
      Fiber& fiber = e.fibers[thread];
      if (fiber.done || (fiber.ready && !fiber.ready())) continue;
      progress = true;
      e.current = thread;
      swapcontext(&e.scheduler, &fiber.context);
      e.current = -1;
      if (!e.error.empty()) return;
      left -= fiber.done;
    }
    progress |= e.deliver();
    if (!e.error.empty()) return;
    if (!progress) return fail(describe_deadlock());
  }
}

inline void run_block(uint32_t block, int threads, const std::function<void()>& body) {
  Engine& e = engine();
  e.block = block;
  e.num_threads = threads;
  e.body = body;
  e.current = -1;
  e.warps.assign(threads / kWarpThreads, Meeting());
  e.named.clear();
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
