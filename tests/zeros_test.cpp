// Who gets which words of csrc/zeros.cuh, run by test_cuda.py. Prints what is wrong; exit status 1 if anything.
#include "zeros.cuh"

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using namespace fused_peft;

static int wrong = 0;
static void check(bool holds, int line, const char* what) {
  if (!holds && wrong++ < 20) std::printf("line %d: %s\n", line, what);
}
#define CHECK(...) check((__VA_ARGS__), __LINE__, #__VA_ARGS__)

// A CUDA whose handles are pointers to what they stand for.
struct Fake {
  static inline int made = 0;
  static inline bool full = false;
  static const char* look(void* handle, Stream* stream) {
    *stream = *static_cast<Stream*>(handle);
    return nullptr;
  }
  static const char* zeros(size_t bytes, void** data) {
    if (full) return "out of memory";
    *data = std::calloc(bytes, 1);
    ++made;
    return nullptr;
  }
};

struct Words {
  uint32_t *from, *to;
  bool meets(const Words& other) const { return from < other.to && other.from < to; }
};

int main() {
  Zeros<Fake> zeros;
  auto get = [&](Stream stream, size_t words) {
    uint32_t* data = nullptr;
    CHECK(!zeros.get(&stream, words, &data));
    for (size_t i = 0; i < words; ++i) CHECK(data[i] == 0);
    CHECK(reinterpret_cast<uint64_t>(data) % 16 == 0);
    return Words{data, data + words};
  };
  Stream one{0, 1, false}, two{0, 2, false}, there{1, 1, false}, captured{0, 1, true};

  // launches on a stream share their words, whatever is launched elsewhere between them
  Words first = get(one, 9);
  CHECK(get(two, 40).from != first.from);
  CHECK(get(one, 9).from == first.from);
  CHECK(get(one, 5).from == first.from);

  // all others have none in common: streams, devices, captured launches, even of the stream, and longer pieces
  std::vector<Words> apart = {first, get(two, 40), get(there, 9)};
  for (int i = 0; i < 3000; ++i) apart.push_back(get(captured, 9 + i % 500));
  apart.push_back(get(one, 70000));
  apart.push_back(get({0, 3, false}, 1 << 20));
  for (size_t i = 0; i < apart.size(); ++i)
    for (size_t j = 0; j < i; ++j) CHECK(!apart[i].meets(apart[j]));
  CHECK(get(one, 9).from == apart[apart.size() - 2].from);  // the longest stays the stream's
  CHECK(Fake::made < 10);

  // from several threads
  std::vector<Words> of(8);
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&, i] {
      for (int again = 0; again < 100; ++again) of[i] = get({0, static_cast<uint64_t>(10 + i), false}, 8 + again);
    });
  for (auto& thread : threads) thread.join();
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < i; ++j) CHECK(!of[i].meets(of[j]));

  // no memory is said, and changes nothing
  Fake::full = true;
  uint32_t* data = nullptr;
  Stream late{2, 1, false};
  CHECK(zeros.get(&late, 8, &data) && !data);
  Fake::full = false;
  get(late, 8);

  if (wrong) std::printf("%d wrong\n", wrong);
  return wrong > 0;
}
