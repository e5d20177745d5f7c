// The activations of an MLP, each the formula that PyTorch uses, on a vector.

#pragma once

#include "../packed_linear.h"
#include "vec.h"

namespace vitslim {
namespace {

#if defined(VITSLIM_TARGET_AVX512)

// x * P(x) = x / 2 + |x| g(|x|) with the normal distribution's P(x) = 1/2 + sign(x) g(|x|). A
// register pair holds 32 numbers to look up, so g is a cubic on each of 32 segments 1/6 wide:
// coefficients [power][segment] of the place in the segment, 0 to 1, with the smallest largest
// error. With rounding, the error divided by max(1, |x|) is at most 2e-7. The last segment, and all
// beyond, is the limit 1/2, so that P is exactly 0 or 1 there.
alignas(64) constexpr float GELU_SEGMENTS[4][32] = {
    {-2.49702161e-08f, 0.0661837608f, 0.13055855f,  0.191462338f, 0.247507319f, 0.297671497f,
     0.341344625f,     0.378327399f,  0.408788741f, 0.43319279f,  0.452209651f, 0.466623515f,
     0.477249891f,     0.484869897f,  0.490184695f, 0.493790358f, 0.496169657f, 0.497696757f,
     0.498650134f,     0.499229014f,  0.499570936f, 0.499767363f, 0.499877125f, 0.499936789f,
     0.49996832f,      0.499984533f,  0.499992669f, 0.499996603f, 0.49999848f,  0.499999315f,
     0.499999702f,     0.5f},
    {0.0664910972f,   0.0655754954f,   0.0629006103f,   0.0586817153f,
     0.0532457493f,   0.0469894968f,   0.0403320156f,   0.033669129f,
     0.0273367148f,   0.0215870272f,   0.0165794846f,   0.0123845618f,
     0.0089974897f,   0.00635759439f,  0.00436912803f,  0.00292029651f,
     0.00189840607f,  0.00120027584f,  0.000738078437f, 0.000441421376f,
     0.000256763538f, 0.000145258746f, 7.99245317e-05f, 4.277072e-05f,
     2.22608414e-05f, 1.12684711e-05f, 5.54774806e-06f, 2.65641938e-06f,
     1.2370997e-06f,  5.60325986e-07f, 2.46833878e-07f, 0.0f},
    {-3.10788096e-06f, -0.000921366853f, -0.00176386524f,  -0.00246555149f,
     -0.00297992746f,  -0.00328392838f,  -0.0033787468f,   -0.00328683108f,
     -0.00304603577f,  -0.00270235701f,  -0.00230274303f,  -0.00188917073f,
     -0.00149480428f,  -0.00114225294f,  -0.000843830348f, -0.000603142485f,
     -0.000417392439f, -0.000279811095f, -0.000181792726f, -0.000114509938f,
     -6.99525917e-05f, -4.14550013e-05f, -2.38377233e-05f, -1.33031945e-05f,
     -7.20655817e-06f, -3.79008225e-06f, -1.93543337e-06f, -9.59776571e-07f,
     -4.622446e-07f,   -2.16235037e-07f, -9.82587451e-08f, 0.0f},
    {-0.000304157002f, -0.000279299653f, -0.000232941049f, -0.000171161999f,
     -0.000101664082f, -3.24407447e-05f, 2.94818474e-05f,  7.89862825e-05f,
     0.000113339454f,  0.00013217883f,   0.000137102455f,  0.000130984321f,
     0.000117306809f,  9.94701622e-05f,  8.03657822e-05f,  6.21307408e-05f,
     4.61007803e-05f,  3.2903401e-05f,   2.26275224e-05f,  1.50130272e-05f,
     9.62031845e-06f,  5.95894335e-06f,  3.57035265e-06f,  2.07046605e-06f,
     1.16266256e-06f,  6.32484387e-07f,  3.33436276e-07f,  1.70403467e-07f,
     8.44432151e-08f,  4.05859666e-08f,  1.89236005e-08f,  0.0f},
};

template <int N>
INLINE void gelu(Vec (&x)[N]) {
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    const Vec size = absolute(x[i]);
    const Vec place = min(mul(size, broadcast(6.0f)), broadcast(31.99999f));
    const Vec r = fraction(place);
    Vec g = look_up(GELU_SEGMENTS[3], place);
    g = fma(g, r, look_up(GELU_SEGMENTS[2], place));
    g = fma(g, r, look_up(GELU_SEGMENTS[1], place));
    g = fma(g, r, look_up(GELU_SEGMENTS[0], place));
    x[i] = fma(size, g, mul(x[i], broadcast(0.5f)));
  }
}

#else

// x * P(x) with the normal distribution's P(x) = 1/2 + x f(x^2). A polynomial approximates f for
// |x| <= 5.3 on t = 2 x^2 / 5.3^2 - 1, where its coefficients alternate and lose nothing by
// cancellation: the largest error, divided by max(1, |x|), is 8e-8, and 2e-7 with rounding. Beyond,
// f stays and x f reaches the limits 1/2, so that P is exactly 0 or 1 there.
constexpr float GELU_COEFFICIENTS[] = {
    -0.000623868895f, 0.00164249842f, -0.00150608167f, 0.00199029245f, -0.00539288344f,
    0.00953940302f,   -0.0134275518f, 0.0186998285f,   -0.0252365377f, 0.0321135744f,
    -0.0395956002f,   0.049262248f,   -0.0665183067f,  0.133392587f};

// Several vectors at once, step by step, for each chain alone is as long as its latencies.
template <int N>
INLINE void gelu(Vec (&x)[N]) {
  const Vec half = broadcast(0.5f), least = broadcast(-0.5f);
  Vec t[N], f[N];
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    t[i] = min(broadcast(28.09f), mul(x[i], x[i]));
    t[i] = fma(t[i], broadcast(0.0711997151f), broadcast(-1.0f));
    f[i] = broadcast(GELU_COEFFICIENTS[0]);
  }
#pragma GCC unroll 16
  for (int c = 1; c < 14; ++c)
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) f[i] = fma(f[i], t[i], broadcast(GELU_COEFFICIENTS[c]));
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    const Vec above = max(least, min(half, mul(x[i], f[i])));
    x[i] = mul(x[i], add(half, above));
  }
}

#endif

// x / (1 + e^-y)
INLINE Vec times_sigmoid(Vec x, Vec y) {
  const Vec one = broadcast(1.0f);
  return mul(x, div(one, add(one, exp2(mul(y, broadcast(-1.44269504f))))));
}

// x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), for (1 + tanh y) / 2 = 1 / (1 + e^-2y)
INLINE Vec gelu_tanh(Vec x) {
  const Vec slope = fma(mul(x, x), broadcast(0.0713548163f), broadcast(1.59576912f));
  return times_sigmoid(x, mul(x, slope));
}

template <Activation A, int N>
INLINE void activate(Vec (&x)[N]) {
  if constexpr (A == Activation::GELU) return gelu(x);
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    if constexpr (A == Activation::GELU_TANH) x[i] = gelu_tanh(x[i]);
    if constexpr (A == Activation::QUICK_GELU)
      x[i] = times_sigmoid(x[i], mul(x[i], broadcast(1.702f)));
    if constexpr (A == Activation::SILU) x[i] = times_sigmoid(x[i], x[i]);
    if constexpr (A == Activation::RELU) x[i] = max(zero(), x[i]);
  }
}

}  // namespace
}  // namespace vitslim
