// Asynchronous copies, done as late as they may be: when their group is waited for.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) emulation::fail("no asynchronous copy has that size");
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes) emulation::fail("a misaligned asynchronous copy");
  emulation::block.here().open.push_back({to, from, bytes});
}

inline void __pipeline_commit() {
  emulation::Fiber& fiber = emulation::block.here();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline void __pipeline_wait_prior(size_t newest) {
  auto& groups = emulation::block.here().groups;
  for (; groups.size() > newest; groups.pop_front())
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}
