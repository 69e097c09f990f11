// What this machine can do at most: multiply-adds a second, and bytes copied a second.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));

// Two multiply-adds can start in a cycle and each takes four, so eight chains would do; twelve and their two
// operands still fit the sixteen registers of AVX2.
constexpr int kChains = 12;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs `work(thread)` on all threads at once and adds up the rates that they report.
template <class Work>
double on_threads(int threads, Work work) {
  std::atomic<int> ready{0};
  std::vector<double> rates(threads);
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i)
    pool.emplace_back([&, i] {
      ++ready;
      while (ready < threads) std::this_thread::yield();
      rates[i] = work(i);
    });
  double sum = 0;
  for (int i = 0; i < threads; ++i) {
    pool[i].join();
    sum += rates[i];
  }
  return sum;
}

volatile double sink;  // what is never read might never be computed
volatile double factor = 0.999, term = 0.001;

template <class Vector, class Scalar>
double chains(int64_t iterations) {
  constexpr int lanes = sizeof(Vector) / sizeof(Scalar);
  Vector acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = Vector{} + Scalar(c);
  const Vector a = Vector{} + Scalar(factor), b = Vector{} + Scalar(term);
  const double start = now();
  for (int64_t i = 0; i < iterations; ++i)
    for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * a + b;
  const double seconds = now() - start;
  Vector sum = {};
  for (int c = 0; c < kChains; ++c) sum += acc[c];
  sink = sum[0];
  return 2.0 * lanes * kChains * double(iterations) / seconds;
}

}  // namespace

extern "C" {

// Floating-point operations a second, two for each multiply-add, of all threads together.
double multiply_add_rate_f32(int threads, int64_t iterations) {
  return on_threads(threads, [=](int) { return chains<Floats, float>(iterations); });
}

double multiply_add_rate_f64(int threads, int64_t iterations) {
  return on_threads(threads, [=](int) { return chains<Doubles, double>(iterations); });
}

// Bytes a second, read and written, of all threads together, each copying its part of `bytes` bytes.
double copy_rate(int threads, int64_t bytes, char* to, const char* from) {
  const int64_t part = bytes / threads;
  return on_threads(threads, [=](int i) {
    const double start = now();
    std::memcpy(to + i * part, from + i * part, part);
    return 2.0 * double(part) / (now() - start);
  });
}
}
