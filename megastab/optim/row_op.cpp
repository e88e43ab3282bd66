// OrthoAdam's row update (row_step.step_rows, rotation "hadamard") in one pass over memory, a row at a time in an L1 buffer.
//
//   r = Q g;  m = b1 m + (1 - b1) r;  v = b2 v + (1 - b2) r^2;  p = decay p - lr Q^T ((m / c1) / (sqrt(v) / c2 + eps))
//   Q x = scale (A (x) H_n)(signs * x),  D = odd * n,  n a power of two, H_n in Sylvester's order
//
// Butterflies go from the widest distance to the narrowest, and back the other way, whatever the width of a vector: so the bits of a
// row depend neither on the rows beside it nor on AVX2 or AVX-512. Square roots and divisions are exact. Without AVX the same code
// runs on vectors of four.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// As row_op.py lays it out.
struct Numbers {
    float keep1, take1, keep2, take2;  // b1, 1 - b1, b2, 1 - b2
    float correct1, correct2, eps;     // 1 / (1 - b1^t), 1 / sqrt(1 - b2^t)
    float decay, rate, scale;          // 1 - lr wd, lr, n^-1/2
};

namespace {
#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr const char* SAID = "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
constexpr const char* SAID = "AVX2";
#else
constexpr int LANES = 4;
constexpr const char* SAID = "plain";
#endif
constexpr int BLOCK = 16;           // vectors held in registers
constexpr int MAX_ODD = 64;         // as rotation.py has it
constexpr int64_t GRAIN = 1 << 15;  // elements worth a thread

#define INLINE inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));  // partitions begin anywhere
typedef int lanes __attribute__((vector_size(LANES * 4)));

INLINE vec load(const float* from) { return *reinterpret_cast<const loose*>(from); }
INLINE void store(float* to, vec x) { *reinterpret_cast<loose*>(to) = x; }
INLINE vec all(float x) { return vec{} + x; }

INLINE float times_plus(float a, float b, float c) {
#if defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE vec times_plus(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE float root(float x) { return std::sqrt(x); }

INLINE vec root(vec x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_sqrt_ps(x);
#else
    for (int i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

template <class T>
struct Pace {
    T keep1, take1, keep2, take2, correct1, correct2, eps, scale;
};

INLINE Pace<vec> widened(const Numbers& n) {
    return {all(n.keep1), all(n.take1), all(n.keep2), all(n.take2), all(n.correct1), all(n.correct2), all(n.eps), all(n.scale)};
}

INLINE Pace<float> narrow(const Numbers& n) { return {n.keep1, n.take1, n.keep2, n.take2, n.correct1, n.correct2, n.eps, n.scale}; }

// The rotated gradient before its scale to the update before the learning rate. The scale comes after the sums: coordinates that
// cancel exactly must give zero.
template <class T>
INLINE T adam(T sum, T& mean, T& square, const Pace<T>& at) {
    T r = sum * at.scale;
    mean = times_plus(mean, at.keep1, r * at.take1);
    square = times_plus(square, at.keep2, (r * r) * at.take2);
    return (mean * at.correct1) / times_plus(root(square), at.correct2, at.eps);
}

INLINE vec adam_at(vec sum, float* mean, float* square, const Pace<vec>& at) {
    vec m = load(mean), v = load(square);
    vec u = adam(sum, m, v, at);
    store(mean, m);
    store(square, v);
    return u;
}

// -- butterflies -----------------------------------------------------------------------------------------------------

template <int S, int H, bool IS_DOWN>
INLINE void butterflies(vec* x) {
    if constexpr (H >= 1 && H < S) {
#pragma GCC unroll 16
        for (int i = 0; i < S / 2; ++i) {
            const int a = i / H * 2 * H + i % H, b = a + H;
            const vec low = x[a], high = x[b];
            x[a] = low + high;
            x[b] = low - high;
        }
        butterflies<S, IS_DOWN ? H / 2 : H * 2, IS_DOWN>(x);
    }
}

template <int S> INLINE void down(vec* x) { butterflies<S, S / 2, true>(x); }
template <int S> INLINE void up(vec* x) { butterflies<S, 1, false>(x); }

// Lane i takes lane i ^ H plus or minus itself; times +-1 is exact, so fusing it rounds no otherwise than a sum does.
template <int H, int... I>
INLINE vec pair_lanes(vec x, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    const vec other = __builtin_shufflevector(x, x, (I ^ H)...);
#else
    const vec other = __builtin_shuffle(x, lanes{(I ^ H)...});
#endif
    return times_plus(x, vec{((I & H) ? -1.0f : 1.0f)...}, other);
}

template <int H, bool IS_DOWN>
INLINE vec within(vec x) {
    if constexpr (H >= 1 && H < LANES)
        return within<IS_DOWN ? H / 2 : H * 2, IS_DOWN>(pair_lanes<H>(x, std::make_integer_sequence<int, LANES>{}));
    else
        return x;
}

INLINE vec lanes_down(vec x) { return within<LANES / 2, true>(x); }
INLINE vec lanes_up(vec x) { return within<1, false>(x); }

// -- passes over a row -----------------------------------------------------------------------------------------------

struct Row {
    float *weights, *mean, *square;
    const float *gradient, *signs;
    float* x;  // the buffer
};

// Tell the cache what comes next: the row's own weights, and the row after it.
INLINE void ahead(const Row& row, int64_t at, int64_t width) {
    __builtin_prefetch(row.weights + at, 1, 2);
    __builtin_prefetch(row.gradient + at + width, 0, 2);
    __builtin_prefetch(row.mean + at + width, 1, 2);
    __builtin_prefetch(row.square + at + width, 1, 2);
}

template <int S>
void enter(const Row& row, int64_t first, int64_t n) {
    const int64_t stride = n / S;
    for (int64_t c = first; c < first + stride; c += LANES) {
        vec x[S];
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) x[s] = load(row.gradient + c + s * stride) * load(row.signs + c + s * stride);
        down<S>(x);
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) store(row.x + c + s * stride, x[s]);
    }
}

template <int S>
void leave(const Row& row, int64_t first, int64_t n, const Numbers& by) {
    const int64_t stride = n / S;
    const vec decay = all(by.decay), rate = all(-by.scale * by.rate);
    for (int64_t c = first; c < first + stride; c += LANES) {
        vec x[S];
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) x[s] = load(row.x + c + s * stride);
        up<S>(x);
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s)  // all loads before the stores: addresses a multiple of 4 KiB apart alias
            x[s] = times_plus(load(row.weights + c + s * stride), decay, x[s] * (load(row.signs + c + s * stride) * rate));
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) store(row.weights + c + s * stride, x[s]);
    }
}

// Radix S in place over each S * stride elements: what is left of rows too long for one pass.
template <int S, bool IS_DOWN>
void between(float* row, int64_t n, int64_t stride) {
    for (float* x0 = row; x0 < row + n; x0 += S * stride)
        for (int64_t c = 0; c < stride; c += LANES) {
            vec x[S];
#pragma GCC unroll 16
            for (int s = 0; s < S; ++s) x[s] = load(x0 + c + s * stride);
            IS_DOWN ? down<S>(x) : up<S>(x);
#pragma GCC unroll 16
            for (int s = 0; s < S; ++s) store(x0 + c + s * stride, x[s]);
        }
}

// The last K * LANES distances, and with IS_WHOLE the moments and the way back: all in registers.
template <int K, bool IS_WHOLE>
void middle(const Row& row, int64_t width, const Pace<vec>& at) {
    for (int64_t c = 0; c < width; c += K * LANES) {
        vec x[K];
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) x[k] = load(row.x + c + k * LANES);
        down<K>(x);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
            const int64_t e = c + k * LANES;
            if (LANES == 16 || e % 16 == 0) ahead(row, e, width);
            x[k] = lanes_down(x[k]);
            if constexpr (IS_WHOLE) x[k] = lanes_up(adam_at(x[k], row.mean + e, row.square + e, at));
        }
        if constexpr (IS_WHOLE) up<K>(x);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) store(row.x + c + k * LANES, x[k]);
    }
}

template <int K>
void middle_up(const Row& row, int64_t width) {
    for (int64_t c = 0; c < width; c += K * LANES) {
        vec x[K];
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) x[k] = lanes_up(load(row.x + c + k * LANES));
        up<K>(x);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) store(row.x + c + k * LANES, x[k]);
    }
}

template <class T>
INLINE T spread(float x) {
    if constexpr (sizeof(T) == sizeof(float)) return x;
    else return all(x);
}

// y = A x, or A^T x; odd is M where that is known, so that all of it stays in registers.
template <int M, bool IS_TRANSPOSED, class T>
INLINE void product(const float* a, const T* x, T* y, int odd) {
    const int m = M ? M : odd;
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
        T sum = x[0] * spread<T>(IS_TRANSPOSED ? a[i] : a[i * m]);
#pragma GCC unroll 8
        for (int j = 1; j < m; ++j) sum = times_plus(x[j], spread<T>(IS_TRANSPOSED ? a[j * m + i] : a[i * m + j]), sum);
        y[i] = sum;
    }
}

// A across the odd blocks of n, the moments, and A^T.
template <int M>
void mix(const Row& row, int64_t n, const float* a, int odd, const Pace<vec>& at) {
    const int m = M ? M : odd;
    vec x[M ? M : MAX_ODD], y[M ? M : MAX_ODD];
    for (int64_t c = 0; c < n; c += LANES) {
#pragma GCC unroll 8
        for (int i = 0; i < m; ++i) x[i] = load(row.x + i * n + c);
        product<M, false>(a, x, y, m);
#pragma GCC unroll 8
        for (int i = 0; i < m; ++i) y[i] = adam_at(y[i], row.mean + i * n + c, row.square + i * n + c, at);
        product<M, true>(a, y, x, m);
#pragma GCC unroll 8
        for (int i = 0; i < m; ++i) store(row.x + i * n + c, x[i]);
    }
}

// -- a row -----------------------------------------------------------------------------------------------------------

struct Shape {
    int64_t width, n;  // width = odd * n
    int odd;
    const float* a;  // [odd, odd]
};

template <bool IS_DOWN>
void between_by(int radix, float* x, int64_t n, int64_t stride) {
    switch (radix) {
        case 2: return between<2, IS_DOWN>(x, n, stride);
        case 4: return between<4, IS_DOWN>(x, n, stride);
        case 8: return between<8, IS_DOWN>(x, n, stride);
        case 16: return between<16, IS_DOWN>(x, n, stride);
    }
}

// Distances between those of the first pass and those a block of registers holds; back the same way in the other order.
template <bool IS_DOWN>
void rest(const Row& row, int64_t width, int64_t size) {
    if (size <= BLOCK * LANES) return;
    const int64_t radix = std::min<int64_t>(16, size / (BLOCK * LANES));
    if (!IS_DOWN) rest<IS_DOWN>(row, width, size / radix);
    between_by<IS_DOWN>(static_cast<int>(radix), row.x, width, size / radix);
    if (IS_DOWN) rest<IS_DOWN>(row, width, size / radix);
}

template <int K>
void centre(const Row& row, const Shape& shape, const Pace<vec>& at) {
    if (shape.odd == 1) return middle<K, true>(row, shape.width, at);
    middle<K, false>(row, shape.width, at);
    switch (shape.odd) {
        case 3: mix<3>(row, shape.n, shape.a, 3, at); break;
        case 5: mix<5>(row, shape.n, shape.a, 5, at); break;
        case 7: mix<7>(row, shape.n, shape.a, 7, at); break;
        default: mix<0>(row, shape.n, shape.a, shape.odd, at);
    }
    middle_up<K>(row, shape.width);
}

template <int S>
void long_row(const Row& row, const Shape& shape, const Numbers& by) {
    const int64_t n = shape.n, width = shape.width;
    const Pace<vec> at = widened(by);
    for (int64_t first = 0; first < width; first += n) enter<S>(row, first, n);
    rest<true>(row, width, n / S);
    switch (std::min<int64_t>(BLOCK, n / LANES)) {
        case 1: centre<1>(row, shape, at); break;
        case 2: centre<2>(row, shape, at); break;
        case 4: centre<4>(row, shape, at); break;
        case 8: centre<8>(row, shape, at); break;
        case 16: centre<16>(row, shape, at); break;
    }
    rest<false>(row, width, n / S);
    for (int64_t first = 0; first < width; first += n) leave<S>(row, first, n, by);
}

void butterfly(float* x, int64_t width, int64_t h) {
    for (int64_t i = 0; i < width; ++i)
        if (!(i & h)) {
            const float low = x[i], high = x[i + h];
            x[i] = low + high;
            x[i + h] = low - high;
        }
}

// n below a vector's lanes: the same sums in the same order, one by one.
void short_row(const Row& row, const Shape& shape, const Numbers& by) {
    const int64_t n = shape.n, width = shape.width;
    const Pace<float> at = narrow(by);
    const float rate = -by.scale * by.rate;
    float* x = row.x;
    for (int64_t i = 0; i < width; ++i) x[i] = row.gradient[i] * row.signs[i];
    for (int64_t h = n / 2; h >= 1; h /= 2) butterfly(x, width, h);
    for (int64_t c = 0; c < n; ++c) {
        float y[MAX_ODD], z[MAX_ODD];
        for (int i = 0; i < shape.odd; ++i) y[i] = x[i * n + c];
        if (shape.odd > 1) product<0, false>(shape.a, y, z, shape.odd);
        else z[0] = y[0];
        for (int i = 0; i < shape.odd; ++i) z[i] = adam(z[i], row.mean[i * n + c], row.square[i * n + c], at);
        if (shape.odd > 1) product<0, true>(shape.a, z, y, shape.odd);
        else y[0] = z[0];
        for (int i = 0; i < shape.odd; ++i) x[i * n + c] = y[i];
    }
    for (int64_t h = 1; h < n; h *= 2) butterfly(x, width, h);
    for (int64_t i = 0; i < width; ++i) row.weights[i] = times_plus(row.weights[i], by.decay, x[i] * (row.signs[i] * rate));
}

void one_row(const Row& row, const Shape& shape, const Numbers& by) {
    if (shape.n < LANES) return short_row(row, shape, by);
    switch (std::min<int64_t>(16, shape.n / (BLOCK * LANES))) {
        case 2: return long_row<2>(row, shape, by);
        case 4: return long_row<4>(row, shape, by);
        case 8: return long_row<8>(row, shape, by);
        case 16: return long_row<16>(row, shape, by);
        default: return long_row<1>(row, shape, by);
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* row_op_said() { return SAID; }

// Contiguous fp32 [rows, odd * n], in place. a: [odd, odd].
extern "C" __attribute__((visibility("default"))) void row_op_step(
    float* weights, const float* gradient, float* mean, float* square, const float* signs, const float* a,
    int64_t rows, int64_t n, int64_t odd, const Numbers* by) {
    const Shape shape{odd * n, n, static_cast<int>(odd), a};
    const int64_t width = shape.width;
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / width), [&](int64_t begin, int64_t end) {
        std::vector<float> held(width + 16);
        const auto past = reinterpret_cast<uintptr_t>(held.data()) / 4 % 16;  // a vector must not lie across two cache lines
        float* x = held.data() + (past ? 16 - past : 0);
        for (int64_t i = begin; i < end; ++i)
            one_row({weights + i * width, mean + i * width, square + i * width, gradient + i * width, signs, x}, shape, *by);
    });
}
