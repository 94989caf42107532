// Attention within windows, projections and cyclic shift included.
namespace NAMESPACE {

// The windows of a map: those of `together` neighbours in a row are worked on at a time, PIXELS tokens or one window.
struct Windows {
    Map size;
    long edge, shift;
    long tokens() const { return edge * edge; }
    long together() const { return tokens() < PIXELS ? PIXELS / tokens() : 1; }
    long room() const { return together() * tokens(); }  // tokens in memory
    long across() const { return (size.w / edge + together() - 1) / together(); }
    long tasks() const { return size.b * (size.h / edge) * across(); }
    // Call run(task) for the tasks of a piece, of which a band has `pieces`.
    template <class Run> INLINE void each(const Piece &piece, long pieces, Run run) const {
        const long first = piece.first / edge * across(), tasks = (piece.last - piece.first) / edge * across();
        const long end = first + tasks * (piece.number + 1) / pieces;
        for (long task = first + tasks * piece.number / pieces; task < end; task++) run(task);
    }
    long number(long task) const { return smaller(together(), size.w / edge - task % across() * together()); }
};

// Cut `lines` channels of the windows of a task out of a map, into [channel][room()], or paste them back.
template <bool CUT, long EDGE>
INLINE void move_windows(float *map, const Windows &windows, long task, long lines, float *tokens) {
    const Map &size = windows.size;
    const long edge = EDGE ? EDGE : windows.edge, room = windows.room(), number = windows.number(task);
    const long band = task / windows.across(), bands = size.h / edge, image = band / bands;
    const long column = task % windows.across() * windows.together() * edge + windows.shift;
    const bool wraps = column + number * edge > size.w;
    for (long i = 0; i < edge; i++) {
        float *line = map + (image * size.h + (band % bands * edge + i + windows.shift) % size.h) * size.row();
        float *token = tokens + i * edge;
        for (long k = 0; k < lines; k++, line += size.pitch, token += room) {
            if (!wraps) {
                for (long j = 0; j < number; j++) {
                    float *at = line + column + j * edge, *to = token + j * edge * edge;
                    if (CUT) memcpy(to, at, edge * 4);
                    else memcpy(at, to, edge * 4);
                }
                continue;
            }
            for (long j = 0; j < number; j++)
                for (long p = 0; p < edge; p++) {
                    const long x = column + j * edge + p;
                    float *at = line + (x < size.w ? x : x - size.w), *to = token + j * edge * edge + p;
                    if (CUT) *to = *at;
                    else *at = *to;
                }
        }
    }
}

template <bool CUT>
INLINE void move_windows(float *map, const Windows &windows, long task, long lines, float *tokens) {
    switch (windows.edge) {
    case 4: return move_windows<CUT, 4>(map, windows, task, lines, tokens);
    case 8: return move_windows<CUT, 8>(map, windows, task, lines, tokens);
    case 16: return move_windows<CUT, 16>(map, windows, task, lines, tokens);
    default: return move_windows<CUT, 0>(map, windows, task, lines, tokens);
    }
}

INLINE void cut(const float *map, const Windows &windows, long task, long lines, float *tokens) {
    move_windows<true>(const_cast<float *>(map), windows, task, lines, tokens);
}

INLINE void paste(const float *tokens, const Windows &windows, long task, long lines, float *map) {
    move_windows<false>(map, windows, task, lines, const_cast<float *>(tokens));
}

// out = weights x + bias for the tokens of a task: x is [k][room()], out [n][room()].
INLINE void project(const float *x, const Windows &windows, long task, const float *weights, const float *bias, long k,
                    long n, float *out) {
    const long vectors = windows.number(task) * windows.tokens() / LANES, room = windows.room();
    for (long u = 0; u < vectors; u += V)
        product<WRITE>(smaller(V, vectors - u), x + u * LANES, room, weights, bias, k, n, out + u * LANES, room);
}

// products[j][U vectors of i] = sum over k of x[k][i] * y[k][j], for N of j; returned through `of`(j, u, product).
template <int N, int U, class Of>
INLINE void some_inner_products(const float *x, const float *y, long room, long first, long d, Of of) {
    vec sums[N][U] = {};
    accumulate<N, U>(x, room, y + first, room, 1, d, sums);
    UNROLL for (int i = 0; i < N; i++) { UNROLL for (int u = 0; u < U; u++) of(first + i, u, sums[i][u]); }
}

// The same for all j of a window, whose tokens are a multiple of 16.
template <int U, class Of>
INLINE void inner_products(const float *x, const float *y, long room, long n, long d, Of of) {
    constexpr int N = (FEW ? 12 : 16) / U;  // N * U sums and what they are made of fit the registers
    long j = 0;
    for (; j + N <= n; j += N) some_inner_products<N, U>(x, y, room, j, d, of);
    for (; j < n; j += 2) some_inner_products<2, U>(x, y, room, j, d, of);
}

// out[k][U vectors of i] = factor[i] * sum over j of p[j][i] * y[k][j], over n of j, for N of k.
template <int N, int U>
INLINE void some_weighted(const float *p, const float *y, long room, long n, const vec (&factor)[U], float *out) {
    vec sums[N][U] = {};
    accumulate<N, U>(p, U * LANES, y, 1, room, n, sums);
    UNROLL for (int i = 0; i < N; i++) {
        UNROLL for (int u = 0; u < U; u++) store(out + i * room + u * LANES, sums[i][u] * factor[u]);
    }
}

template <int U>
INLINE void weighted(const float *p, const float *y, long room, long n, long d, const vec (&factor)[U], float *out) {
    constexpr int N = FEW ? 10 / U : 10;  // more would need more addresses than there are registers
    long k = 0;
    for (; k + N <= d; k += N) some_weighted<N, U>(p, y + k * room, room, n, factor, out + k * room);
    for (; k + 2 <= d; k += 2) some_weighted<2, U>(p, y + k * room, room, n, factor, out + k * room);
    for (; k < d; k++) some_weighted<1, U>(p, y + k * room, room, n, factor, out + k * room);
}

// softmax(q qT) v for one window of n tokens; the logarithm of each row's sum of exponentials into `sums` if given.
template <int U>
inline void attention(const float *q, const float *v, long room, long n, long d, float *maps, float *out, float *sums) {
    for (long first = 0; first < n; first += U * LANES) {
        vec top[U], sum[U] = {};
        UNROLL for (int u = 0; u < U; u++) top[u] = vec{} - 3e38f;
        inner_products<U>(q + first, q, room, n, d, [&](long j, int u, vec logit) {
            top[u] = larger(top[u], logit);
            store(maps + (j * U + u) * LANES, logit);
        });
        for (long j = 0; j < n; j++) {
            UNROLL for (int u = 0; u < U; u++) {
                float *at = maps + (j * U + u) * LANES;
                const vec p = exponential(load(at) - top[u]);
                sum[u] += p;
                store(at, p);
            }
        }
        if (sums)
            for (int u = 0; u < U; u++)
                for (int i = 0; i < LANES; i++) sums[first + u * LANES + i] = top[u][i] + __builtin_logf(sum[u][i]);
        UNROLL for (int u = 0; u < U; u++) sum[u] = 1.f / sum[u];
        weighted<U>(maps, v, room, n, d, sum, out + first);
    }
}

// Attend in the windows of a task of one group: project x (windows.size) to queries and values, or to values where the
// queries of an earlier module are there, and write the result to `out`: d lines of such a map.
//
// queries: [task][d][room()], written or read; or null.
static void attend(const float *x, float *out, float *queries, bool shares, const Windows &windows, long task, long d,
                   const float *weights, const float *bias, float *scratch) {
    const long c = windows.size.c, room = windows.room(), n = windows.tokens(), projected = shares ? d : 2 * d;
    float *tokens = scratch, *q = tokens + c * room, *v = q + (shares ? 0 : d * room);
    float *result = q + projected * room, *maps = result + d * room;
    cut(x, windows, task, c, tokens);
    project(tokens, windows, task, weights, bias, c, projected, q);
    if (queries) {
        float *shared = queries + task * d * room;
        if (shares) q = shared;
        else memcpy(shared, q, d * room * 4);
    }
    for (long j = 0; j < windows.number(task); j++)
        (n % (2 * LANES) ? attention<1> : attention<2>)(q + j * n, v + j * n, room, n, d, maps, result + j * n, nullptr);
    paste(result, windows, task, d, out);
}

}  // namespace NAMESPACE
