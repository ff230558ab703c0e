// The functions of ptx.cuh on the CPU: blocks, clusters and threads as fibers, shared memory, mbarriers, TMA with its
// swizzle, wgmma with its descriptors. It decides at random, from a seed, who runs next and when anything asynchronous
// happens: a load lands, a product reads its operands, a store reads shared memory. A kernel that waits too little then
// gives wrong numbers, and one that waits for what never comes is reported with who waits for what.
//
// Memory is weak. What a thread writes with an ordinary instruction is its own until a release shows it, of its own or
// of a thread that it has met since. TMA sees it where the writer's proxy fence orders it, in blocks that have acquired
// it and fenced too; elsewhere perhaps what was there before. What the launch before writes is there for a block that
// has waited. Products want wgmma's fence before the first one, and after registers were the thread's.
//
// Functions that order or wait know the line they are called from; the one whose line is ``left_out`` does nothing.
// Written from the PTX manual, not from the kernel: layouts and arithmetic here share no code with schedule.cuh.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#define FUSED_PEFT_DEVICE inline

struct float2 {
  float x, y;
};

namespace fused_peft {

struct bf16 {};
struct fp16 {};

// A matrix of ``rows`` x ``columns`` in memory and the box that one TMA instruction moves.
struct TensorMap {
  uint8_t* data = nullptr;
  int64_t row_bytes = 0;
  int columns = 0, rows = 0, box_columns = 0, box_rows = 0, element_bytes = 0;
  bool swizzled = false;
};

namespace emulator {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

inline float half_to_float(uint16_t h) {
  int exponent = h >> 10 & 31, fraction = h & 1023;
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                               : exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return h & 0x8000 ? -value : value;
}
inline float bf16_to_float(uint16_t b) {
  uint32_t bits = uint32_t(b) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_half(float value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  float size = std::fabs(value);
  if (value != value) return 0x7FFF;
  if (size >= 65520.f) return sign | 0x7C00;
  if (size < std::ldexp(1.f, -14)) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  float fraction = std::frexp(size, &exponent);  // [0.5, 1)
  return sign | uint16_t(((exponent + 14) << 10) + int(std::nearbyint(std::ldexp(fraction, 11))) - 1024);
}
template <class T>
float to_float(uint16_t bits) {
  return std::is_same_v<T, bf16> ? bf16_to_float(bits) : half_to_float(bits);
}
template <class T>
uint16_t from_float(float value) {
  return std::is_same_v<T, bf16> ? float_to_bf16(value) : float_to_half(value);
}

inline int left_out = 0;

constexpr int SHARED = 227 * 1024, BASE = 512;  // bytes, and where the window starts: aligned less than kernels need

// A word that a thread wrote to memory: ``shown`` to all threads, ``fenced`` for TMA; where it is both it has landed.
struct Write {
  uint8_t* to;
  uint32_t value;
  bool shown = false, fenced = false, landed = false;
};

// What lies before a point: writes that a release from there on shows, and how many changes of memory are acquired.
struct Past {
  std::vector<Write*> writes;
  size_t acquired = 0;
};

struct Barrier {
  int arrivals = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;
  bool ready = false;
  std::shared_ptr<const Past> past;  // of those that arrived
  void settle() {
    if (pending < 0) fail("an mbarrier got more arrivals than it was made for");
    if (pending == 0 && bytes == 0) {
      pending = arrivals;
      phase ^= 1;
    }
  }
};

// One wgmma of a warpgroup: it can run once its 128 threads have issued it.
struct Product {
  int issued = 0, n = 0;
  bool across = false, accumulate = false, from_registers = false;
  uint64_t left = 0, right = 0;
  float* d[128];
  const uint32_t* a[128];
  std::function<float(uint16_t)> value;
};

struct Warpgroup {
  std::deque<Product> products;
  int64_t first = 0;  // number of the front one
};

struct Machine;
struct Fiber;

// Threads that meet: how often they have, and who is there.
struct Meeting {
  int generation = 0;
  std::vector<Fiber*> here;
};

// A lane at stmatrix.
struct Row {
  Fiber* thread = nullptr;
  uint32_t row = 0, from[4] = {};
};

struct Block {
  Machine* machine;
  int index, rank, left, pace = 1;  // left: threads that have not ended; pace: turns until they move
  std::vector<Block*>* cluster;
  // what threads see and what asynchronous units see; a proxy fence copies a thread's writes to the second
  std::vector<uint8_t> generic, async;
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;  // by name
  std::vector<Warpgroup> groups;
  std::vector<uint64_t> exchange;  // per thread: what a warp-wide instruction passes between lanes
  std::map<int, std::vector<Row>> storing;   // by warp
  std::map<int, std::pair<int, int>> warps;  // at the cluster's barrier: how many lanes, and how long they were apart
  size_t seen = 0;                           // changes of memory that TMA here sees
  bool waited = false;                       // for the launch before

  uint8_t* at(std::vector<uint8_t>& view, uint32_t address, int bytes) {
    if (address < BASE || address + bytes > BASE + view.size()) fail("shared memory address out of range");
    if (!left) fail("shared memory of a block that has ended");
    return view.data() + (address - BASE);
  }
};

struct Fiber {
  Block* block;
  int thread;
  ucontext_t context;
  std::vector<uint8_t> stack;
  std::function<bool()> until;
  const char* why = "";
  int64_t which = 0;
  bool done = false;
  int spins = 0, rest = 0;  // rest: turns that it stands still for
  int64_t products_issued = 0;
  std::vector<int64_t> product_groups;           // products issued when each was committed
  std::vector<std::pair<uint32_t, int>> written;  // shared memory not yet fenced
  std::vector<Write*> own;                        // not landed
  std::shared_ptr<const Past> past;               // of threads that it has met
  size_t acquired = 0;                            // changes of memory
  int apart = 0;                                  // waits since its warp was last together
  bool touched = true;  // it may have touched registers of products since wgmma's fence
  std::map<const uint32_t*, std::vector<uint32_t>> operands;  // of products, in registers, as they were at the fence
  std::vector<int64_t> stores, store_groups;      // tickets; count of them when each group was committed
};

// A word of memory that changed, for TMA, and what it was.
struct Change {
  uint8_t* to;
  uint32_t before;
};

inline thread_local Machine* current = nullptr;

struct Machine {
  std::mt19937 random;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::vector<Block*>> clusters;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::function<void()>> events;  // what is asynchronous and has not happened
  std::map<int64_t, bool> pending;  // tickets of stores that have not read yet
  std::deque<Write> writes;
  std::unordered_map<const uint8_t*, std::vector<Write*>> afloat;  // not landed, in order
  std::vector<Change> changes;
  std::unordered_map<const uint8_t*, std::vector<size_t>> changed;  // where -> which
  const uint8_t *lowest = nullptr, *highest = nullptr;              // of them
  std::set<const uint8_t*> counters;
  bool overlaps = false, before_ended = true;  // the launch before
  size_t before_changes = 0;
  int64_t tickets = 0;
  bool stalls;        // whether single threads stand still for a while
  std::vector<int> waiting, alive;  // clusters that have no room yet; threads that have not ended, by cluster
  size_t room;                      // clusters that run at once, as on a GPU of which others hold a part: of odd seeds
  unsigned slowness;  // how many turns of the threads what is asynchronous takes on average: 2, 8 or 32
  ucontext_t scheduler;
  Fiber* fiber = nullptr;
  std::string error;
  std::function<void()> body;

  Machine(int count, int cluster, int threads, uint32_t seed, std::function<void()> run)
      : random(seed), stalls(seed % 4 == 3), slowness(2u << seed % 3 * 2), body(run) {
    clusters.resize(count / cluster);
    alive.assign(clusters.size(), cluster * threads);
    for (size_t i = 0; i < clusters.size(); ++i) waiting.push_back(i);
    std::shuffle(waiting.begin(), waiting.end(), random);
    room = seed % 2 ? 1 + random() % clusters.size() : clusters.size();
    for (int i = 0; i < count; ++i) {
      auto block = std::make_unique<Block>();
      block->machine = this;
      block->index = i;
      block->rank = i % cluster;
      block->left = threads;
      if (seed % 4 == 2 && i % 2 == seed / 4 % 2) block->pace = 8;  // as blocks that got less of the GPU
      block->cluster = &clusters[i / cluster];
      block->generic.assign(SHARED, 0xFF);  // NaN in every format
      block->async.assign(SHARED, 0xFF);
      block->groups.resize(threads / 128);
      block->exchange.resize(threads);
      clusters[i / cluster].push_back(block.get());
      for (int t = 0; t < threads; ++t) {
        auto f = std::make_unique<Fiber>();
        f->block = block.get();
        f->thread = t;
        f->stack.resize(48 * 1024);
        getcontext(&f->context);
        f->context.uc_stack.ss_sp = f->stack.data();
        f->context.uc_stack.ss_size = f->stack.size();
        f->context.uc_link = &scheduler;
        makecontext(&f->context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
        fibers.push_back(std::move(f));
      }
      blocks.push_back(std::move(block));
    }
  }

  static void enter() {
    Machine* m = current;
    try {
      m->body();
      for (int64_t ticket : m->fiber->stores)
        if (m->pending.count(ticket)) fail("ends while its store reads shared memory");
    } catch (const std::exception& e) {
      if (m->error.empty()) m->error = "block " + std::to_string(m->fiber->block->index) + " thread " +
                                       std::to_string(m->fiber->thread) + ": " + e.what();
    }
    m->fiber->done = true;
    --m->fiber->block->left;
    m->leave();
  }

  // Rows of memory are written by the launch before: nothing is there yet.
  void launch_before(const void* data, int rows, int row_bytes, int64_t stride) {
    std::vector<std::pair<uint8_t*, uint32_t>> words;
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < row_bytes; j += 4) {
        uint8_t* to = static_cast<uint8_t*>(const_cast<void*>(data)) + i * stride + j;
        uint32_t value;
        std::memcpy(&value, to, 4);
        words.push_back({to, value});
        std::memset(to, 0xFF, 4);
      }
    overlaps = true, before_ended = false;
    later([this, words] {
      for (auto& [to, value] : words) change(to, value);
      before_ended = true;
      before_changes = changes.size();
    });
  }

  void change(uint8_t* to, uint32_t value) {
    Change c{to};
    std::memcpy(&c.before, to, 4);
    std::memcpy(to, &value, 4);
    lowest = changes.empty() ? to : std::min<const uint8_t*>(lowest, to);
    highest = std::max<const uint8_t*>(highest, to);
    changed[to].push_back(changes.size());
    changes.push_back(c);
  }

  void land(Write* w) {
    if (w->landed || !w->shown || !w->fenced) return;
    w->landed = true;
    auto& there = afloat[w->to];
    there.erase(std::find(there.begin(), there.end(), w));
    if (there.empty()) afloat.erase(w->to);
    change(w->to, w->value);
  }

  void show(Write* w) {
    w->shown = true;
    land(w);
  }

  // A release of the running thread.
  void release() {
    for (Write* w : fiber->own) show(w);
    if (fiber->past)
      for (Write* w : fiber->past->writes) show(w);
    fiber->past = nullptr;
    auto& own = fiber->own;
    own.erase(std::remove_if(own.begin(), own.end(), [](Write* w) { return w->landed; }), own.end());
  }

  // The word there, as the running thread reads it.
  uint32_t word(const uint8_t* from) {
    uint32_t value;
    std::memcpy(&value, from, 4);
    auto there = afloat.find(from);
    if (there != afloat.end())
      for (Write* w : there->second)
        if (w->shown || std::count(fiber->own.begin(), fiber->own.end(), w)) value = w->value;
    return value;
  }

  // The byte there, as TMA reads it for a block.
  uint8_t byte(const Block& b, const uint8_t* from) {
    if (b.seen < changes.size() && lowest <= from && from < highest + 4) {
      auto there = changed.find(from - reinterpret_cast<uintptr_t>(from) % 4);
      if (there != changed.end())
        for (size_t i : there->second)
          if (i >= b.seen) return changes[i].before >> reinterpret_cast<uintptr_t>(from) % 4 * 8;
    }
    return *from;
  }

  bool now() { return random() % slowness == 0; }

  // Sometimes memory is less weak than it might be.
  void drift() {
    auto seldom = [this] { return random() % (8 * slowness) == 0; };
    for (auto& b : blocks)
      if (b->seen < changes.size() && seldom()) b->seen = changes.size();
    std::vector<Write*> some;
    for (auto& [to, there] : afloat)
      if (seldom()) some.push_back(there.front());
    for (Write* w : some) {
      (w->shown ? w->fenced : w->shown) = true;
      land(w);
    }
  }

  void leave() { swapcontext(&fiber->context, &scheduler); }

  template <class F>
  void wait(const char* why, int64_t which, F until) {
    ++fiber->apart;
    if (until()) return;
    fiber->why = why;
    fiber->which = which;
    fiber->until = std::move(until);
    leave();
  }

  // Everything until all threads are done. Raises what a thread raised, or who waits for what when nobody can go on.
  void run() {
    current = this;
    std::vector<Fiber*> order;
    for (auto& f : fibers) order.push_back(f.get());
    std::vector<bool> begun(clusters.size());
    for (bool left = true; left && error.empty();) {
      size_t busy = 0;
      for (size_t i = 0; i < clusters.size(); ++i) busy += begun[i] && alive[i];
      for (; busy < room && !waiting.empty(); ++busy, waiting.pop_back()) begun[waiting.back()] = true;
      std::shuffle(order.begin(), order.end(), random);
      left = false;
      bool moved = false;
      std::vector<bool> rests(blocks.size());
      for (auto& b : blocks) moved |= rests[b->index] = b->left && random() % b->pace;
      for (Fiber* f : order) {
        if (f->done) continue;
        left = true;
        if (rests[f->block->index]) continue;
        int cluster = f->block->index / f->block->cluster->size();
        if (!begun[cluster]) continue;
        if (f->until && !f->until()) continue;
        if (f->rest || (stalls && random() % 256 == 0)) {
          f->rest = f->rest ? f->rest - 1 : random() % 64;
          moved = true;
          continue;
        }
        f->until = nullptr;
        fiber = f;
        swapcontext(&scheduler, &f->context);
        moved = true;
        alive[cluster] -= f->done;
        if (!error.empty()) break;
      }
      try {
        moved |= happen();
      } catch (const std::exception& e) {
        error = e.what();
      }
      if (left && !moved && events.empty() && error.empty() && !ready_products()) {
        for (Fiber* f : order)
          if (!f->done) {
            error = "deadlock: block " + std::to_string(f->block->index) + " thread " + std::to_string(f->thread) +
                    " waits for " + f->why + " " + std::to_string(f->which);
            if (f->thread % 128 == 0) break;
          }
      }
    }
    for (Write& w : writes) {
      if (!w.landed) std::memcpy(w.to, &w.value, 4);
      if (!w.shown && counters.count(w.to) && error.empty()) error = "a launch that begins may not see the counter";
    }
    while (!before_ended && !events.empty()) {  // for the next to find
      auto event = std::move(events.back());
      events.pop_back();
      if (error.empty()) error = "threads ended before the launch before";
      try {
        event();
      } catch (const std::exception&) {
      }
    }
    current = nullptr;
    if (!error.empty()) throw std::runtime_error(error);
    if (!events.empty()) throw std::runtime_error("threads ended before a load landed or a store read shared memory");
    for (auto& b : blocks)
      for (auto& g : b->groups)
        if (!g.products.empty()) throw std::runtime_error("a product was never waited for");
  }

  // Some of what is asynchronous and may happen now.
  bool happen() {
    bool any = false;
    drift();
    std::shuffle(events.begin(), events.end(), random);
    for (size_t i = 0; i < events.size();) {
      if (now()) {
        auto run = std::move(events[i]);
        events.erase(events.begin() + i);
        run();
        any = true;
      } else {
        ++i;
      }
    }
    for (auto& b : blocks)
      for (auto& g : b->groups)
        while (!g.products.empty() && g.products.front().issued == 128 && random() % slowness < 2) {
          multiply(*b, g.products.front());
          g.products.pop_front();
          ++g.first;
          any = true;
        }
    return any;
  }

  bool ready_products() {
    for (auto& b : blocks)
      for (auto& g : b->groups)
        if (!g.products.empty() && g.products.front().issued == 128) return true;
    return false;
  }

  // Bits 4 to 6 of an address are exchanged by bits 7 to 9: the 128-byte swizzle.
  static uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

  static void multiply(Block& b, Product& p) {
    auto operand = [&](uint64_t descriptor, bool across, int rows) {
      if (descriptor >> 62 != 1) fail("a wgmma descriptor without the 128-byte swizzle");
      uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
               stride = (descriptor >> 32 & 0x3FFF) << 4;
      std::vector<float> v(rows * 16);
      for (int i = 0; i < rows; ++i)
        for (int k = 0; k < 16; ++k) {
          uint32_t address = across ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                                    : start + i / 8 * stride + i % 8 * 128 + k * 2;
          uint16_t bits;
          std::memcpy(&bits, b.at(b.async, swizzle(address), 2), 2);
          v[i * 16 + k] = p.value(bits);
        }
      return v;
    };
    std::vector<float> left(64 * 16), right = operand(p.right, p.across, p.n);
    if (p.from_registers) {
      for (int t = 0; t < 128; ++t)
        for (int i = 0; i < 8; ++i) {
          uint16_t bits = p.a[t][i / 2] >> (i % 2 * 16);
          int row = t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8, k = t % 4 * 2 + i % 2 + i / 4 * 8;
          left[row * 16 + k] = p.value(bits);
        }
    } else {
      left = operand(p.left, false, 64);
    }
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < p.n / 2; ++i) {
        int row = t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        float sum = p.accumulate ? p.d[t][i] : 0.f;
        for (int k = 0; k < 16; ++k) sum += left[row * 16 + k] * right[column * 16 + k];
        p.d[t][i] = sum;
      }
  }

  void later(std::function<void()> run) { events.push_back(std::move(run)); }
};

inline Machine& machine() { return *current; }
inline Fiber& self() { return *current->fiber; }

// What lies before the point that these threads have come to.
inline std::shared_ptr<const Past> common(const std::vector<Fiber*>& threads,
                                          std::shared_ptr<const Past> past = nullptr) {
  Past all;
  auto add = [&all](const std::vector<Write*>& writes, size_t acquired) {
    std::copy_if(writes.begin(), writes.end(), std::back_inserter(all.writes), [](Write* w) { return !w->shown; });
    all.acquired = std::max(all.acquired, acquired);
  };
  if (past) add(past->writes, past->acquired);
  for (Fiber* f : threads) {
    add(f->own, f->acquired);
    if (f->past) add(f->past->writes, f->past->acquired);
  }
  std::sort(all.writes.begin(), all.writes.end());
  all.writes.erase(std::unique(all.writes.begin(), all.writes.end()), all.writes.end());
  return all.writes.empty() && !all.acquired ? nullptr : std::make_shared<const Past>(std::move(all));
}
inline void know(Fiber& f, const std::shared_ptr<const Past>& past) {
  f.past = past;
  if (past) f.acquired = past->acquired;
}

// So many threads of a block, by name, meet; each knows then what any of them did.
inline void meet(Block& b, int name, size_t threads) {
  Meeting& meeting = b.meetings[name];
  int mine = meeting.generation;
  meeting.here.push_back(&self());
  if (meeting.here.size() == threads) {
    auto past = common(meeting.here);
    for (Fiber* f : meeting.here) know(*f, past);
    meeting.here.clear();
    ++meeting.generation;
  }
  machine().wait("threads at sync", name, [=, &meeting] { return meeting.generation != mine; });
  self().apart = 0;
}
inline void meet_warp() { meet(*self().block, 100 + self().thread / 32, 32); }

inline Barrier& barrier(Block& b, uint32_t address) {
  auto found = b.barriers.find(address);
  if (found == b.barriers.end()) fail("an mbarrier that was never made");
  return found->second;
}

inline void check_box(const TensorMap& map, uint32_t shared) {
  if (!map.data) fail("a tensor map that was never made");
  if (shared % (map.swizzled ? 1024 : 128)) fail("a TMA tile that is not aligned");
  if (map.swizzled && map.box_columns * map.element_bytes != 128) fail("a swizzled TMA box that is not 128 bytes wide");
}

// Every element of a box: shared address (less its start), pointer in memory or null outside.
template <class F>
void for_box(const TensorMap& map, uint32_t shared, int column, int row, F each) {
  for (int j = 0; j < map.box_rows; ++j)
    for (int i = 0; i < map.box_columns; ++i) {
      uint32_t to = shared + (j * map.box_columns + i) * map.element_bytes;
      bool inside = column + i >= 0 && column + i < map.columns && row + j >= 0 && row + j < map.rows;
      uint8_t* from = inside ? map.data + (row + j) * map.row_bytes + (column + i) * map.element_bytes : nullptr;
      each(map.swizzled ? Machine::swizzle(to) : to, from);
    }
}

inline void load(const TensorMap* map, uint32_t to, uint32_t bar, int column, int row, uint16_t ranks) {
  check_box(*map, to);
  Block* b = self().block;
  TensorMap copy = *map;
  for (Block* there : *b->cluster) {
    if (!(ranks >> there->rank & 1)) continue;
    machine().later([=] {
      for_box(copy, to, column, row, [&](uint32_t address, uint8_t* from) {
        uint8_t bytes[8] = {};
        for (int i = 0; from && i < copy.element_bytes; ++i) bytes[i] = b->machine->byte(*b, from + i);
        for (auto* view : {&there->generic, &there->async})
          std::memcpy(there->at(*view, address, copy.element_bytes), bytes, copy.element_bytes);
      });
      Barrier& full = barrier(*there, bar);
      if (!full.ready) fail("an mbarrier used before the fence");
      full.bytes -= copy.box_columns * copy.box_rows * copy.element_bytes;
      full.settle();
    });
  }
}

}  // namespace emulator

namespace ptx {

using namespace emulator;

inline int thread() { return self().thread; }
inline int block() { return self().block->index; }
inline int blocks() { return machine().blocks.size(); }
inline int uniform(int value) { return value; }
inline int cluster_rank() { return self().block->rank; }
inline uint32_t shared_memory() { return BASE; }

inline void sync_warp(int line = __builtin_LINE()) {
  if (line != left_out) meet_warp();
}
template <int THREADS>
void sync_named(int name, int line = __builtin_LINE()) {
  if (line != left_out) meet(*self().block, name, THREADS);
}
inline void sync_block(int line = __builtin_LINE()) {
  if (line != left_out) meet(*self().block, 0, self().block->groups.size() * 128);
}
inline void sync_cluster(int line = __builtin_LINE()) {
  if (line == left_out) return;
  Block& b = *self().block;
  auto& [here, apart] = b.warps[thread() / 32];  // the instruction is an aligned one
  if (here == 0) apart = self().apart;
  if (apart != self().apart) fail("a warp comes to the cluster's barrier one by one");
  here = (here + 1) % 32;
  meet(*b.cluster->front(), -1, b.groups.size() * 128 * b.cluster->size());
}
inline void fence_barriers(int line = __builtin_LINE()) {
  if (line == left_out) return;
  for (auto& [address, b] : self().block->barriers) b.ready = true;
}
inline void fence_async_shared(int line = __builtin_LINE()) {
  if (line == left_out) return;
  Fiber& f = self();
  for (auto& [address, bytes] : f.written)
    std::memcpy(f.block->at(f.block->async, address, bytes), f.block->at(f.block->generic, address, bytes), bytes);
  f.written.clear();
}
// The writer's and the reader's: the manual leaves open whether one of the two would do.
inline void fence_async(int line = __builtin_LINE()) {
  if (line == left_out) return;
  fence_async_shared(-1);
  Fiber& f = self();
  for (Write* w : f.own) {
    w->fenced = true;
    machine().land(w);
  }
  f.block->seen = std::max(f.block->seen, f.acquired);
}
inline void fence_device(int line = __builtin_LINE()) {
  if (line != left_out) machine().release();
}
inline void wait_for_launch_before(int line = __builtin_LINE()) {
  if (line == left_out) return;
  Machine* m = &machine();
  m->wait("the launch before", 0, [=] { return m->before_ended; });
  self().block->seen = std::max(self().block->seen, m->before_changes);
  self().block->waited = true;
}
template <int REGISTERS>
void give_registers() {}
template <int REGISTERS>
void take_registers() {}

inline void barrier_init(uint32_t address, int arrivals) {
  if (address % 8) fail("an mbarrier that is not aligned");
  self().block->at(self().block->generic, address, 8);
  self().block->barriers[address] = {arrivals, arrivals};
}
inline void barrier_expect(uint32_t address, int bytes, int line = __builtin_LINE()) {
  if (line == left_out) return;
  Barrier& b = barrier(*self().block, address);
  b.past = common({&self()}, b.past);
  b.bytes += bytes;
  --b.pending;
  b.settle();
}
inline void barrier_arrive(uint32_t address, int rank, int line = __builtin_LINE()) {
  if (line == left_out) return;
  Block& there = *self().block->cluster->at(rank);
  there.at(there.generic, address, 8);
  Barrier& b = barrier(there, address);
  b.past = common({&self()}, b.past);
  if (!b.ready) fail("an mbarrier used before the fence");
  --b.pending;
  b.settle();
}
inline void barrier_wait(uint32_t address, uint32_t parity, int line = __builtin_LINE()) {
  if (line == left_out) return;
  Barrier* b = &barrier(*self().block, address);
  machine().wait("the mbarrier at", address, [=] { return (b->phase & 1) != parity; });
  know(self(), common({&self()}, b->past));
}

inline void send(uint32_t word, uint32_t to, uint32_t bar, int rank) {
  Block* there = self().block->cluster->at(rank);
  if (to % 4) fail("a word that is not aligned");
  machine().later([=] {
    std::memcpy(there->at(there->generic, to, 4), &word, 4);
    Barrier& full = barrier(*there, bar);
    full.bytes -= 4;
    full.settle();
  });
}

inline void prefetch(const TensorMap*) {}
inline void load(const TensorMap* map, uint32_t to, uint32_t bar, int column, int row) {
  emulator::load(map, to, bar, column, row, uint16_t(1 << self().block->rank));
}
inline void load_multicast(const TensorMap* map, uint32_t to, uint32_t bar, int column, int row, uint16_t ranks) {
  emulator::load(map, to, bar, column, row, ranks);
}
inline void store(const TensorMap* map, uint32_t from, int column, int row) {
  check_box(*map, from);
  Machine* m = &machine();
  Block* b = self().block;
  if (m->overlaps && !b->waited) fail("a result over what the launch before may still read");
  int64_t ticket = ++m->tickets;
  m->pending[ticket] = true;
  self().stores.push_back(ticket);
  TensorMap copy = *map;
  m->later([=] {
    for_box(copy, from, column, row, [&](uint32_t address, uint8_t* to) {
      if (to) std::memcpy(to, b->at(b->async, address, copy.element_bytes), copy.element_bytes);
    });
    m->pending.erase(ticket);
  });
}
inline void store_commit(int line = __builtin_LINE()) {
  if (line != left_out) self().store_groups.push_back(self().stores.size());
}
template <int PENDING>
void store_wait_read(int line = __builtin_LINE()) {
  if (line == left_out) return;
  Fiber* f = &self();
  Machine* m = &machine();
  int groups = int(f->store_groups.size()) - PENDING;
  int64_t upto = groups > 0 ? f->store_groups[groups - 1] : 0;
  m->wait("its stores", upto, [=] {
    for (int64_t i = 0; i < upto; ++i)
      if (m->pending.count(f->stores[i])) return false;
    return true;
  });
}

// Lane 8j + i passes the address of row i of matrix j; lane l gets or gives elements 2(l % 4) and on of row l / 4.
inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  Block& b = *self().block;
  int first = thread() / 32 * 32, lane = thread() % 32;
  b.exchange[thread()] = row;
  meet_warp();
  for (int j = 0; j < 4; ++j)
    std::memcpy(&to[j], b.at(b.generic, uint32_t(b.exchange[first + 8 * j + lane / 4]) + lane % 4 * 4, 4), 4);
  meet_warp();
}
// Lanes wait for each other, but it orders no memory: a row is written once the lanes that give it are there, and may
// be what TMA sees at once.
inline void store_matrices(uint32_t row, const uint32_t (&from)[4]) {
  Block& b = *self().block;
  int warp = thread() / 32 * 32, lane = thread() % 32;
  auto& here = b.storing[warp];
  here.resize(32);
  here[lane] = {&self(), row, {from[0], from[1], from[2], from[3]}};
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 8; ++i) {
      bool whole = here[8 * j + i].thread;
      for (int l = 4 * i; l < 4 * i + 4; ++l) whole = whole && here[l].thread;
      if (!whole || (lane != 8 * j + i && lane / 4 != i)) continue;
      for (int l = 4 * i; l < 4 * i + 4; ++l) {
        uint32_t address = here[8 * j + i].row + l % 4 * 4;
        for (auto* view : {&b.generic, &b.async})
          if (view == &b.generic || machine().random() % 2)
            std::memcpy(b.at(*view, address, 4), &here[l].from[j], 4);
        here[l].thread->written.push_back({address, 4});
      }
    }
  meet_warp();
  here[lane] = {};
  meet_warp();
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low) | uint32_t(from_float<T>(high)) << 16;
}
template <class T>
float2 unpack(uint32_t both) {
  return {to_float<T>(both), to_float<T>(both >> 16)};
}

template <class T>
T read(const T* from) {
  if (!current || machine().afloat.empty()) return *from;
  T value;
  for (size_t i = 0; i < sizeof(T); ++i) {
    auto* byte = reinterpret_cast<const uint8_t*>(from) + i;
    int inside = reinterpret_cast<uintptr_t>(byte) % 4;
    reinterpret_cast<uint8_t*>(&value)[i] = machine().word(byte - inside) >> inside * 8;
  }
  return value;
}
template <class T>
T read_shared(uint32_t from) {
  T value;
  std::memcpy(&value, self().block->at(self().block->generic, from, sizeof(T)), sizeof(T));
  return value;
}
inline void write(uint32_t* to, uint32_t value) {
  Machine& m = machine();
  m.writes.push_back({reinterpret_cast<uint8_t*>(to), value});
  self().own.push_back(&m.writes.back());
  m.afloat[m.writes.back().to].push_back(&m.writes.back());
}
inline uint32_t peek(const uint32_t* from) { return read(from); }
// Atomic, an acquire and a release; left out, it is no longer these two.
inline uint32_t add(uint32_t* to, uint32_t value, int line = __builtin_LINE()) {
  Machine& m = machine();
  if (line != left_out) {
    self().acquired = m.changes.size();
    m.release();
  }
  uint32_t before = read(to);
  while (m.afloat.count(reinterpret_cast<uint8_t*>(to))) {
    Write* w = m.afloat[reinterpret_cast<uint8_t*>(to)].front();
    w->shown = w->fenced = true;
    m.land(w);
  }
  m.change(reinterpret_cast<uint8_t*>(to), before + value);
  return before;
}
// Orders nothing else. A launch that begins before this one has ended may count too, so what is written there is shown.
inline uint32_t take(uint32_t* counter) {
  machine().counters.insert(reinterpret_cast<uint8_t*>(counter));
  return add(counter, 1, left_out);
}
inline void pause() {
  if (++self().spins > 100000) fail("spins for ever on a flag");
  self().until = [] { return true; };
  self().why = "a flag";
  machine().leave();
}

inline void products_begin(int line = __builtin_LINE()) {
  if (line == left_out) return;
  self().touched = false;
  for (auto& [at, values] : self().operands) values.assign(at, at + 4);
}
inline void products_commit(int line = __builtin_LINE()) {
  if (line != left_out) self().product_groups.push_back(self().products_issued);
}
template <int PENDING>
void products_wait(int line = __builtin_LINE()) {
  if (line == left_out) return;
  Fiber* f = &self();
  int groups = int(f->product_groups.size()) - PENDING;
  int64_t upto = groups > 0 ? f->product_groups[groups - 1] : 0;
  Warpgroup* g = &f->block->groups[f->thread / 128];
  machine().wait("its products", upto, [=] { return g->first >= upto; });
  f->touched |= upto == f->products_issued;
}
inline Product& issue(int n, uint64_t b, int accumulate, bool across, float* d) {
  Fiber& f = self();
  if (f.touched) fail("a product without wgmma's fence before it");
  Warpgroup& g = f.block->groups[f.thread / 128];
  size_t at = f.products_issued++ - g.first;
  if (at == g.products.size()) g.products.emplace_back();
  Product& p = g.products.at(at);
  if (p.issued && (p.n != n || p.right != b || p.across != across || p.accumulate != bool(accumulate)))
    fail("threads of a warpgroup issue different products");
  p.n = n;
  p.right = b;
  p.across = across;
  p.accumulate = accumulate;
  p.d[f.thread % 128] = d;
  ++p.issued;
  return p;
}
template <class T, int N, int ACROSS>
void product(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  Product& p = issue(N, b, accumulate, ACROSS, d);
  if (p.issued > 1 && p.left != a) fail("threads of a warpgroup issue different products");
  p.left = a;
  p.value = to_float<T>;
}
template <class T, int N, int ACROSS>
void product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  auto [known, unknown] = self().operands.try_emplace(a, a, a + 4);
  if (!unknown && !std::equal(a, a + 4, known->second.begin())) fail("registers changed after wgmma's fence");
  Product& p = issue(N, b, accumulate, ACROSS, d);
  p.from_registers = true;
  p.a[self().thread % 128] = a;
  p.value = to_float<T>;
}

}  // namespace ptx
}  // namespace fused_peft
