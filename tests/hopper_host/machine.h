// One block of CUDA threads on the host: threads that take turns, barriers, and a copy engine.
//
// A thread runs until it waits; who runs next, and when a copy lands, is drawn from HOST_SEED.  What
// the hardware leaves undefined is an error here: a block in which all wait, threads that diverge
// in a collective instruction, an arrival too many.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// Of the thread that runs, and how many blocks there are.
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace host {

inline void require(bool right, const char* what) {
  if (!right) throw std::runtime_error(what);
}

// From the environment.
inline unsigned setting(const char* name, unsigned otherwise) {
  const char* value = std::getenv(name);
  return value ? static_cast<unsigned>(std::stoul(value)) : otherwise;
}

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::function<bool()> ready;  // what it waits for; none: it can run
  const char* waits_for = "";
  bool done = false;
};

// Of an mbarrier: arrivals and bytes that are missing before its phase ends.
struct Barrier {
  int arrivals, missing;
  std::int64_t bytes = 0;
  std::uint32_t parity = 0;  // of the phase that goes on

  void settle() {
    if (missing || bytes) return;
    missing = arrivals;
    parity ^= 1;
  }
};

// Of the threads of a warp, a warpgroup or a block in one instruction.
struct Meeting {
  int arrived = 0, round = 0;
  const char* what = "";
};

class Machine {
 public:
  std::map<const void*, Barrier> barriers;

  // One block of threads, each of which runs `body`.
  void run(int threads, const std::function<void()>& body) {
    random_.seed(setting("HOST_SEED", 0) + 1000003u * blockIdx.x);
    barriers.clear(), meetings_.clear(), copies_.clear(), error_.clear();
    // One warp that hardly ever gets its turn: the others run as far ahead as they are let.
    slow_ = random_() % 2 ? static_cast<int>(random_() % (threads / 32)) : -1;
    body_ = &body;
    threads_ = std::vector<Thread>(threads);
    for (Thread& x : threads_) begin(x);
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0u);
    while (turn()) {
    }
    if (!error_.empty()) throw std::runtime_error(error_);
    for (const auto& [at, barrier] : barriers) {
      require(barrier.bytes == 0, "a block ended before its copies");
    }
  }

  // The running thread goes on when `ready`.
  void wait(const char* what, std::function<bool()> ready) {
    Thread& self = threads_[threadIdx.x];
    self.waits_for = what, self.ready = std::move(ready);
    swapcontext(&self.context, &scheduler_);
  }

  int threads() const { return static_cast<int>(threads_.size()); }

  // All `count` threads from a multiple of `count` on, in the same instruction.
  void meet(int count, const char* what) {
    const int first = static_cast<int>(threadIdx.x) / count * count;
    Meeting& x = meetings_[{first, count}];
    if (x.arrived == 0) x.what = what;
    if (std::strcmp(x.what, what)) {
      throw std::runtime_error(std::string("threads diverge: ") + x.what + " and " + what);
    }
    const int round = x.round;
    if (++x.arrived == count) {
      x.arrived = 0, ++x.round;
    } else {
      wait(what, [&x, round] { return x.round != round; });
    }
  }

  // The value of the thread of this warp's lane `from`.
  std::uint32_t shuffle(std::uint32_t value, int from) {
    words_[threadIdx.x] = value;
    meet(32, "shuffle");
    const std::uint32_t got = words_[threadIdx.x / 32 * 32 + from];
    meet(32, "shuffle, read");
    return got;
  }

  void copy(std::function<void()> perform) { copies_.push_back(std::move(perform)); }

  Barrier& barrier(const void* at) {
    require(barriers.count(at), "an mbarrier was not initialised");
    return barriers.at(at);
  }

 private:
  static constexpr std::size_t STACK = 64 * 1024;

  void begin(Thread& x) {
    x.stack = std::make_unique<char[]>(STACK);
    getcontext(&x.context);
    x.context.uc_stack.ss_sp = x.stack.get();
    x.context.uc_stack.ss_size = STACK;
    x.context.uc_link = &scheduler_;
    makecontext(&x.context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
  }

  static void enter();

  // Each thread that can run does, in a random order; false at the end, and in an error.
  bool turn() {
    bool moved = false, left = false;
    const bool skip = slow_ >= 0 && random_() % 64;
    std::shuffle(order_.begin(), order_.end(), random_);
    for (const unsigned next : order_) {
      threadIdx.x = next;
      Thread& x = threads_[next];
      if (x.done) continue;
      left = true;
      const bool ready = !x.ready || x.ready();
      moved |= ready;
      if (!ready || (skip && static_cast<int>(threadIdx.x / 32) == slow_)) continue;
      x.ready = nullptr;
      swapcontext(&scheduler_, &x.context);
      if (!error_.empty()) return false;
    }
    for (std::size_t i = copies_.size(); i-- > 0;) {
      moved = true;
      if (random_() % 3) continue;
      copies_[i]();
      copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (left && !moved) error_ = "all threads wait" + told();
    return left && error_.empty();
  }

  std::string told() {
    std::map<std::string, int> waits;
    for (const Thread& x : threads_) {
      if (!x.done) ++waits[x.waits_for];
    }
    std::string text;
    for (const auto& [what, count] : waits) text += "; " + std::to_string(count) + ": " + what;
    return text;
  }

  std::mt19937 random_;
  int slow_ = -1;
  const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<unsigned> order_;  // of a turn
  ucontext_t scheduler_;
  std::map<std::pair<int, int>, Meeting> meetings_;
  std::vector<std::function<void()>> copies_;
  std::uint32_t words_[1024];
  std::string error_;
};

inline Machine machine;

inline void Machine::enter() {
  const unsigned self = threadIdx.x;
  try {
    (*machine.body_)();
  } catch (const std::exception& error) {
    machine.error_ = "thread " + std::to_string(self) + ": " + error.what();
  }
  machine.threads_[self].done = true;
}

}  // namespace host
