// Device memory that every launch finds zero and leaves zero: a counter of tiles and INLINE's flags.
//
// Two launches may have the same words only if one has ended before the other draws its first tile.
//   A stream      Its launches follow each other, so they share a piece. A launch may begin before the one before it has
//                 ended (programmatic dependent launch), but never before a GEMM's blocks have all gone: only
//                 griddepcontrol.launch_dependents would allow it, and the GEMM has none; the words are back at zero, behind
//                 a fence, when its blocks go. A stream is told by its id, which no other ever gets: the handle of one that
//                 is destroyed goes to another, while its launches may still run.
//   A graph       A captured launch runs at every replay: on any stream, beside other graphs, beside calls on the stream it
//                 was captured on, and its branches side by side. It gets a piece of its own, for good, since nothing
//                 tells when the last copy of the graph is gone. CUDA runs an executable graph once at a time; who makes
//                 two of one capture and runs them at once has them write the same results, too.
//   Other memory  Pieces are never given back, so no other call gets them, as it would from an allocator that counts a
//                 tensor's uses: 32 bytes and 4 a row of tiles, for each stream (the longest so far, and shorter ones before
//                 it) and each captured launch. A chunk is made and zeroed at once, outside any stream of the caller's: the
//                 capture does not see it, and no launch can come before the zeros.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace fused_peft {

struct Stream {
  int device;
  uint64_t id;
  bool capturing;
};

// Cuda: ``status = look(handle, &stream)`` and ``status = zeros(bytes, &data)`` on the current device; null is success.
template <class Cuda>
class Zeros {
 public:
  // So many words for a launch on the stream, in ``data``; what CUDA says when it has none.
  const char* get(void* handle, size_t words, uint32_t** data) {
    Stream stream;
    if (const char* wrong = Cuda::look(handle, &stream)) return wrong;
    std::lock_guard<std::mutex> alone(mutex);
    Piece fresh, &mine = stream.capturing ? fresh : of_streams[{stream.device, stream.id}];
    if (mine.words < words) {
      if (const char* wrong = cut(stream.device, words, &mine)) return wrong;
    }
    *data = mine.data;
    return nullptr;
  }

 private:
  struct Piece {
    uint32_t* data = nullptr;
    size_t words = 0;
  };

  // From what is left of the chunk, or a new one.
  const char* cut(int device, size_t words, Piece* piece) {
    Piece& chunk = chunks[device];
    size_t whole = (words + 7) / 8 * 8;  // 32 bytes, which no other's words share
    if (chunk.words < whole) {
      size_t most = whole > CHUNK ? whole : CHUNK;
      void* data;
      if (const char* wrong = Cuda::zeros(4 * most, &data)) return wrong;
      chunk = {static_cast<uint32_t*>(data), most};
    }
    *piece = {chunk.data, whole};
    chunk = {chunk.data + whole, chunk.words - whole};
    return nullptr;
  }

  static constexpr size_t CHUNK = 1 << 18;
  std::mutex mutex;
  std::map<std::pair<int, uint64_t>, Piece> of_streams;
  std::map<int, Piece> chunks;  // what is left of the last one made
};

}  // namespace fused_peft
