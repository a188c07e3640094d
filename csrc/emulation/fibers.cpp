// The scheduler behind cuda.h: one fiber a CUDA thread, switched at barriers and warp exchanges.
// Hardened builds replace longjmp by one that aborts when it leaves for another stack.
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/cuda.h"

namespace grace::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kExchangeBytes = 64;
constexpr int kLanes = 32;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

// Control goes from the scheduler to a fiber and back. Each side leaves by _longjmp to where the
// other left off, which costs no system call, unlike swapcontext; that one only enters a fiber.
struct Fiber {
  ucontext_t entry;
  jmp_buf at;
  bool entered = false;
  std::unique_ptr<char[]> stack;
  Thread thread;
  State state = State::kReady;
  unsigned mask = 0;  // the lanes that a warp barrier waits for
};

struct Warp {
  alignas(16) std::array<std::array<unsigned char, kExchangeBytes>, kLanes> slots;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  jmp_buf at_scheduler;
  int running = 0;
};

thread_local Block* current = nullptr;

Fiber& running_fiber() { return current->fibers[static_cast<size_t>(current->running)]; }

void enter_fiber() {
  (*current->body)();
  running_fiber().state = State::kDone;
  _longjmp(current->at_scheduler, 1);
}

void wait_in(State state) {
  Fiber& fiber = running_fiber();
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) _longjmp(current->at_scheduler, 1);
}

void resume(Block& block, Fiber& fiber) {
  if (_setjmp(block.at_scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.at, 1);
  fiber.entered = true;
  swapcontext(&block.scheduler, &fiber.entry);
}

void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStackBytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, &enter_fiber, 0);
  fiber.entered = false;
  fiber.state = State::kReady;
}

[[noreturn]] void undefined(const std::string& what) {
  throw std::runtime_error("emulated kernel: " + what);
}

// Releases the block barrier when every thread that has not exited waits at it.
bool release_block(Block& block) {
  bool waiting = false;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kReady || fiber.state == State::kAtWarpBarrier) return false;
    waiting |= fiber.state == State::kAtBlockBarrier;
  }
  for (Fiber& fiber : block.fibers)
    if (fiber.state == State::kAtBlockBarrier) fiber.state = State::kReady;
  return waiting;
}

// Releases the lanes of a warp whose whole mask waits at a warp barrier.
bool release_warp(Block& block, size_t first) {
  bool released = false;
  const size_t last = std::min(first + kLanes, block.fibers.size());
  for (size_t i = first; i < last; ++i) {
    if (block.fibers[i].state != State::kAtWarpBarrier) continue;
    const unsigned mask = block.fibers[i].mask;
    bool complete = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      const size_t j = first + static_cast<size_t>(lane);
      if (j >= last || block.fibers[j].state == State::kDone)
        undefined("a warp exchange names a lane that does not take part in it");
      complete &= block.fibers[j].state == State::kAtWarpBarrier && block.fibers[j].mask == mask;
    }
    if (!complete) continue;
    for (int lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1u) block.fibers[first + static_cast<size_t>(lane)].state = State::kReady;
    released = true;
  }
  return released;
}

bool run_ready_fibers(Block& block) {
  bool progress = false;
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    if (block.fibers[i].state != State::kReady) continue;
    block.running = static_cast<int>(i);
    resume(block, block.fibers[i]);
    progress = true;
  }
  return progress;
}

bool all_done(const Block& block) {
  for (const Fiber& fiber : block.fibers)
    if (fiber.state != State::kDone) return false;
  return true;
}

void run_block(Block& block) {
  for (Fiber& fiber : block.fibers) start(fiber);
  // All bits set is NaN in fp32, fp16 and bf16: what is read before it is written shows.
  std::fill(block.shared.begin(), block.shared.end(), static_cast<unsigned char>(0xff));
  while (!all_done(block)) {
    bool progress = run_ready_fibers(block);
    for (size_t first = 0; first < block.fibers.size(); first += kLanes)
      progress |= release_warp(block, first);
    progress |= release_block(block);
    if (!progress && !all_done(block)) undefined("a barrier that not every thread reaches");
  }
}

void lay_out_threads(Block& block, dim3 grid, dim3 dim) {
  size_t i = 0;
  for (unsigned z = 0; z < dim.z; ++z)
    for (unsigned y = 0; y < dim.y; ++y)
      for (unsigned x = 0; x < dim.x; ++x) {
        Thread& thread = block.fibers[i++].thread;
        thread.index = dim3(x, y, z);
        thread.block_dim = dim;
        thread.grid_dim = grid;
      }
}

}  // namespace

const Thread& thread() { return running_fiber().thread; }

unsigned char* dynamic_shared() {
  // 128-byte alignment, as the kernels declare it.
  const auto address = reinterpret_cast<uintptr_t>(current->shared.data());
  return current->shared.data() + (128 - address % 128) % 128;
}

void block_barrier() { wait_in(State::kAtBlockBarrier); }

void warp_gather(unsigned mask, const void* value, void* results, size_t bytes) {
  if (bytes > kExchangeBytes) undefined("a warp exchange of more than 64 bytes a lane");
  Warp& warp = current->warps[static_cast<size_t>(current->running) / kLanes];
  Fiber& fiber = running_fiber();
  fiber.mask = mask;
  std::memcpy(warp.slots[static_cast<size_t>(lane())].data(), value, bytes);
  wait_in(State::kAtWarpBarrier);
  for (size_t i = 0; i < kLanes; ++i)
    std::memcpy(static_cast<unsigned char*>(results) + i * bytes, warp.slots[i].data(), bytes);
  wait_in(State::kAtWarpBarrier);  // nobody overwrites a slot before all have read
}

void warp_exchange(unsigned mask, const void* value, void* result, size_t bytes, int source) {
  if (!(mask >> source & 1u)) undefined("a warp exchange reads a lane outside its mask");
  std::array<unsigned char, kExchangeBytes * kLanes> all;
  warp_gather(mask, value, all.data(), bytes);
  std::memcpy(result, all.data() + static_cast<size_t>(source) * bytes, bytes);
}

void run(dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& body) {
  const size_t threads = size_t{dim.x} * dim.y * dim.z;
  if (threads == 0 || threads > 1024) undefined("a block must have 1 to 1024 threads");
  Block block;
  block.fibers.resize(threads);
  block.warps.resize((threads + kLanes - 1) / kLanes);
  block.shared.resize(shared_bytes + 128);
  block.body = &body;
  lay_out_threads(block, grid, dim);
  Block* const outer = current;
  current = &block;
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          for (Fiber& fiber : block.fibers) fiber.thread.block_index = dim3(x, y, z);
          run_block(block);
        }
  } catch (...) {
    current = outer;
    throw;
  }
  current = outer;
}

}  // namespace grace::emulation
