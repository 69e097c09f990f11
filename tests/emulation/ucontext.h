// In place of the system's, for cuda_runtime.h: contexts that change without a call of the operating system, which the
// signal mask would take.  A context is entered the system's way once; from then on it is jumped to, also when it is
// made anew after its end.
#pragma once

#include_next <ucontext.h>

namespace emulation {

struct Context : ::ucontext_t {
  void* at[5];  // where it goes on
  bool entered = false;
  void (*body)() = nullptr;
};
using ucontext_t = Context;

inline Context* entering = nullptr;

__attribute__((noinline)) inline void run_bodies() {
  Context* const own = entering;
  for (;;) {
    own->body();
    if (!__builtin_setjmp(own->at)) __builtin_longjmp(static_cast<Context*>(own->uc_link)->at, 1);
  }
}

inline void getcontext(Context* context) {
  if (!context->entered) ::getcontext(context);
}

inline void makecontext(Context* context, void (*body)(), int) {
  context->body = body;
  if (!context->entered) ::makecontext(context, run_bodies, 0);
}

__attribute__((noinline)) inline void swapcontext(Context* from, Context* to) {
  from->entered = true;
  if (__builtin_setjmp(from->at)) return;
  if (to->entered) __builtin_longjmp(to->at, 1);
  to->entered = true;
  entering = to;
  ::setcontext(to);
}

}  // namespace emulation
