// Device memory by the rules of PyTorch's caching allocator: what is freed belongs to the stream on which it
// was allocated, and is given out there again at once; other streams must have been noted. Freed memory is
// overwritten in the order of its stream, so that whoever uses it longer than that reads garbage. What is
// allocated in the capture of a graph belongs to that graph, too, as long as there is one.
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "simt/runtime/cudart.h"
#include "simt/runtime/host_work.h"
#include "simt/torch/device.h"

namespace standin {
namespace {

constexpr size_t kUnit = 512;
constexpr int kGarbage = 0xff;  // NaN in floating point, -1 in integers

struct Block {
  void* data;
  size_t bytes;
  cudaStream_t stream;
  std::set<cudaStream_t> users = {};    // other streams
  std::vector<cudaEvent_t> until = {};  // freed, and used by others up to here
  int owners = 1;                       // a tensor, and a graph

  bool is_captured() const {
    const auto captured = [](cudaStream_t s) { return simt::is_captured(s); };
    return captured(stream) || std::any_of(users.begin(), users.end(), captured);
  }
};

void give_back(void* block);

class Memory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &give_back, kDevice};
    Block* block = take((bytes + kUnit - 1) / kUnit * kUnit, current_stream());
    if (simt::is_captured(current_stream())) {
      ++block->owners;
      simt::keep_with_capture(current_stream(), std::shared_ptr<void>(block, &give_back));
    }
    return {block->data, block, &give_back, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    catch_up_with_current_stream();
    default_copy_data(to, from, bytes);
  }

  void free(Block* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (--block->owners > 0) return;
    used_ -= block->bytes;
    freed_.push_back(block);
    look_through_those_freed();
  }
  void note_use(Block* block, cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stream != block->stream) block->users.insert(stream);
  }
  size_t used() {
    std::lock_guard<std::mutex> lock(mutex_);
    return used_;
  }

 private:
  Block* take(size_t bytes, cudaStream_t stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    used_ += bytes;
    look_through_those_in_use();
    // In a capture, new memory: what is queued to be done with the old may still come, beside the graph.
    const auto found = simt::is_captured(stream) ? free_.end() : free_.find({stream, bytes});
    if (found != free_.end()) {
      Block* block = found->second;
      free_.erase(found);
      return block;
    }
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, kUnit, bytes) == 0, "CUDA out of memory (of the simulated GPU)");
    std::memset(data, kGarbage, bytes);
    return new Block{data, bytes, stream};
  }
  void reuse(Block* block) {
    simt::put_off(block->stream,
                  [data = block->data, bytes = block->bytes] { std::memset(data, kGarbage, bytes); });
    free_.insert({{block->stream, block->bytes}, block});
  }
  // In the middle of a capture nothing can be known of its streams, nor be queued there.
  void look_through_those_freed() {
    std::vector<Block*> captured;
    for (Block* block : std::exchange(freed_, {})) {
      block->is_captured() ? captured.push_back(block) : let_go(block);
    }
    freed_ = std::move(captured);
  }
  void let_go(Block* block) {
    for (const cudaStream_t user : std::exchange(block->users, {})) {
      cudaEvent_t event = nullptr;
      cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
      cudaEventRecord(event, user);
      block->until.push_back(event);
    }
    block->until.empty() ? reuse(block) : in_use_.push_back(block);
  }
  void look_through_those_in_use() {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    look_through_those_freed();
    std::vector<Block*> still;
    for (Block* block : std::exchange(in_use_, {})) {
      if (block->is_captured()) {
        still.push_back(block);
        continue;
      }
      while (!block->until.empty() && cudaEventQuery(block->until.back()) == cudaSuccess) {
        cudaEventDestroy(block->until.back());
        block->until.pop_back();
      }
      block->until.empty() ? reuse(block) : still.push_back(block);
    }
    cudaGetLastError();  // cudaErrorNotReady
    in_use_ = std::move(still);
    cudaThreadExchangeStreamCaptureMode(&mode);
  }

  std::mutex mutex_;  // guards the members below it
  std::multimap<std::pair<cudaStream_t, size_t>, Block*> free_;
  std::vector<Block*> freed_, in_use_;
  size_t used_ = 0;
};

Memory& memory() {
  static auto* const one = new Memory;  // tensors may outlive the end of the program
  return *one;
}

void give_back(void* block) {
  if (block) memory().free(static_cast<Block*>(block));
}

}  // namespace

c10::Allocator& allocator() { return memory(); }

void note_use(const c10::DataPtr& data, cudaStream_t stream) {
  if (data.get_deleter() != &give_back || !data.get_context()) return;  // others' memory, as a heap's
  memory().note_use(static_cast<Block*>(data.get_context()), stream);
}

size_t used_bytes() { return memory().used(); }

}  // namespace standin
