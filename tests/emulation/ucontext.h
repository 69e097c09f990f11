// In place of the system's, for cuda_runtime.h: contexts that change without a call of the operating system, which the
// signal mask would take.  A context is entered the system's way once; from then on it is jumped to, also when it is
// made anew after its end.
#pragma once

#include_next <ucontext.h>

#include <setjmp.h>

namespace emulation {

struct Context : ::ucontext_t {
  jmp_buf at;  // where it goes on
  bool entered = false;
  void (*body)() = nullptr;
};
using ucontext_t = Context;

inline Context* entering = nullptr;

inline void run_bodies() {
  Context* const own = entering;
  for (;;) {
    own->body();
    if (!_setjmp(own->at)) _longjmp(static_cast<Context*>(own->uc_link)->at, 1);
  }
}

inline void getcontext(Context* context) {
  if (!context->entered) ::getcontext(context);
}

inline void makecontext(Context* context, void (*body)(), int) {
  context->body = body;
  if (!context->entered) ::makecontext(context, run_bodies, 0);
}

inline void swapcontext(Context* from, Context* to) {
  from->entered = true;
  if (_setjmp(from->at)) return;
  if (to->entered) _longjmp(to->at, 1);
  to->entered = true;
  entering = to;
  ::setcontext(to);
}

}  // namespace emulation
