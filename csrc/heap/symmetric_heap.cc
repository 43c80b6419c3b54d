#include "heap/symmetric_heap.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

namespace commlib {
namespace {

// Regions that this process created, by file descriptor, for its in-process ranks.
std::mutex own_regions_mutex;
std::map<int, std::weak_ptr<Region>> own_regions;

constexpr const char* kOpenFiles =
    "Is the limit of open files reached? Raise it (ulimit -n), or close communicators that are not needed.";

[[noreturn]] void fail(const std::string& what, const char* hint) {
  throw std::runtime_error(what + ": " + std::strerror(errno) + ". " + hint);
}

}  // namespace

Region::Region(int fd, size_t bytes, bool keep) : fd_(fd), bytes_(bytes), data_(nullptr) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED) {
    const int error = errno;
    close(fd);
    errno = error;
    fail("cannot map " + std::to_string(bytes) + " bytes of shared memory",
         "Lower max_tokens, capacity or slots, or raise the address space limit (ulimit -v).");
  }
  data_ = static_cast<std::byte*>(p);
  if (keep) return;
  close(fd);
  fd_ = -1;
}

// memfd rather than shm_open: it has no name, so nothing is left behind however the job dies, even between
// creation and unlink, and it is not bound by the size of /dev/shm (64 MB in a default container).
std::shared_ptr<Region> Region::create(size_t bytes) {
  const int fd = memfd_create("commlib", MFD_CLOEXEC);
  if (fd < 0) fail("cannot create shared memory (memfd_create)", kOpenFiles);
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    close(fd);
    errno = error;
    fail("cannot reserve " + std::to_string(bytes) + " bytes of shared memory",
         "Lower max_tokens, capacity or slots.");
  }
  std::shared_ptr<Region> region(new Region(fd, bytes, true));
  std::lock_guard<std::mutex> lock(own_regions_mutex);
  own_regions[fd] = region;
  return region;
}

std::shared_ptr<Region> Region::open(pid_t owner, int fd, size_t bytes) {
  if (owner == getpid()) {
    std::lock_guard<std::mutex> lock(own_regions_mutex);
    const auto found = own_regions.find(fd);
    if (found != own_regions.end()) {
      if (auto region = found->second.lock()) return region;
    }
    errno = EBADF;
    fail("no heap " + std::to_string(fd) + " in this process",
         "Was the communicator closed while others opened it?");
  }
  const std::string path = "/proc/" + std::to_string(owner) + "/fd/" + std::to_string(fd);
  const int mine = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (mine < 0 && (errno == EMFILE || errno == ENFILE)) fail("cannot open another rank's heap", kOpenFiles);
  if (mine < 0) {
    fail("cannot open the heap of process " + std::to_string(owner),
         "Ranks on one host must run as one user and see each other's /proc (same PID namespace: one "
         "container, or "
         "docker run --pid=host).");
  }
  return std::shared_ptr<Region>(new Region(mine, bytes, false));
}

Region::~Region() {
  munmap(data_, bytes_);
  if (fd_ >= 0) close(fd_);
}

size_t Region::touched_bytes() const {
  struct stat status;
  return fstat(fd_, &status) == 0 ? static_cast<size_t>(status.st_blocks) * 512 : 0;
}

}  // namespace commlib
