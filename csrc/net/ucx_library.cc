#include "net/ucx_transport.h"

#if __has_include(<ucp/api/ucp.h>)
#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "net/ucx_library.h"

namespace commlib {
namespace {

std::mutex mutex;  // guards `loaded` while it is filled
UcxLibrary loaded;

// UCX reads these as it is loaded. A setting of the user's takes precedence.
constexpr const char* kSettings[][2] = {
    {"UCX_HANDLE_ERRORS", "none"},       // no signal handlers in the user's process
    {"UCX_MEM_MMAP_HOOK_MODE", "none"},  // nor hooks in malloc: only rings are registered, and once
    {"UCX_LOG_LEVEL", "fatal"},          // commlib says itself which rank was lost, and in which phase
    {"UCX_WARN_UNUSED_ENV_VARS", "n"},
};

// The environment as UCX is to see it, for as long as this lives.
class UcxSettings {
 public:
  UcxSettings() {
    for (const auto& [name, value] : kSettings) {
      if (std::getenv(name)) continue;
      setenv(name, value, 1);
      set_.push_back(name);
    }
  }
  ~UcxSettings() {
    for (const char* name : set_) unsetenv(name);
  }

 private:
  std::vector<const char*> set_;
};

std::string why_not_loaded(void* library, UcxLibrary* functions) {
  std::string missing;
  const auto find = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
    if (!*function && missing.empty())
      missing = std::string("it has no ") + name + ": is it older than 1.13?";
  };
#define COMMLIB_UCX_FIND(name) find(#name, &functions->name);
  COMMLIB_UCX_FUNCTIONS(COMMLIB_UCX_FIND)
#undef COMMLIB_UCX_FIND
  return missing;
}

}  // namespace

std::string load_ucx(const std::vector<std::string>& paths) {
  std::lock_guard<std::mutex> lock(mutex);
  if (loaded.ucp_get_version_string) return loaded.ucp_get_version_string();
  const UcxSettings settings;
  std::string tried;
  for (const std::string& path : paths) {
    std::string why;
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      UcxLibrary functions;
      why = why_not_loaded(library, &functions);
      if (why.empty()) {
        loaded = functions;
        return loaded.ucp_get_version_string();
      }
    } else {
      why = dlerror();
    }
    tried += "\n  " + path + ": " + why;
  }
  throw std::runtime_error("no UCX library:" + tried);
}

const UcxLibrary& ucx() {
  if (!loaded.ucp_get_version_string) throw std::runtime_error("UCX has not been loaded");
  return loaded;
}

}  // namespace commlib

#else
#include <stdexcept>

namespace commlib {

std::string load_ucx(const std::vector<std::string>&) {
  throw std::runtime_error("commlib was built where there were no UCX headers");
}
std::unique_ptr<Transport> make_ucx_transport(int, UcxOptions) {
  load_ucx({});
  return nullptr;
}

}  // namespace commlib
#endif
