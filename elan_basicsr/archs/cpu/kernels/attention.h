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
    const long next = smaller(column + number * edge, size.w);  // where the next task begins: in so many lines at once
                                                                // that no processor would fetch it by itself
    for (long i = 0; i < edge; i++) {
        float *line = map + (image * size.h + (band % bands * edge + i + windows.shift) % size.h) * size.row();
        float *token = tokens + i * edge;
        for (long k = 0; k < lines; k++, line += size.pitch, token += room) {
            __builtin_prefetch(line + next, !CUT, 2);
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

// out = weights x + bias for the tokens of a task: x is [k][room()] or pairs of these lines, out [n][room()].
template <Factors F = FACTORS>
INLINE void project(const float *x, const Windows &windows, long task, const float *weights, const float *bias, long k,
                    long n, float *out) {
    const long vectors = windows.number(task) * windows.tokens() / LANES, room = windows.room();
    for (long u = 0; u < vectors; u += V)
        product<WRITE, F>(smaller(V, vectors - u), x + u * LANES, room, weights, bias, k, n, out + u * LANES, room);
}

// products[j][U vectors of i] = sum over k of x[k][i] * y[k][j], for N of j; returned through `of`(j, u, product).
template <int N, int U, class Of>
INLINE void some_inner_products(const float *x, const float *y, long room, long first, long d, Of of) {
    vec sums[N][U] = {};
    accumulate<N, U, SINGLE>(x, room, y + first, room, 1, d, sums);
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

// out[k][U vectors of i] = factor[i] * sum over j of p[j][i] * y[k][j], over n of j, for N of k; p and y are factors.
template <int N, int U>
INLINE void some_weighted(const float *p, const float *y, long room, long n, const vec (&factor)[U], float *out) {
    vec sums[N][U] = {};
    accumulate<N, U>(p, U * LANES, y, 1, room / TOGETHER, n / TOGETHER, sums);
    UNROLL for (int i = 0; i < N; i++) {
        UNROLL for (int u = 0; u < U; u++) store(out + i * room + u * LANES, sums[i][u] * factor[u]);
    }
}

template <int U>
INLINE void weighted(const float *p, const float *y, long room, long n, long d, const vec (&factor)[U], float *out) {
    constexpr int N = FEW ? 10 / U : 10;  // more would need more addresses than there are registers
    long k = 0;
    for (; k + N <= d; k += N) some_weighted<N, U>(p, y + k * room / TOGETHER, room, n, factor, out + k * room);
    for (; k + 2 <= d; k += 2) some_weighted<2, U>(p, y + k * room / TOGETHER, room, n, factor, out + k * room);
    for (; k < d; k++) some_weighted<1, U>(p, y + k * room / TOGETHER, room, n, factor, out + k * room);
}

// softmax(q qT) v for one window of n tokens, q in numbers and v in factors; the logarithm of each row's sum of
// exponentials into `sums` if given.
template <int U>
inline void attention(const float *q, const float *v, long room, long n, long d, float *maps, float *out, float *sums) {
    for (long first = 0; first < n; first += U * LANES) {
        vec top[U], sum[U] = {};
        UNROLL for (int u = 0; u < U; u++) top[u] = vec{} - 3e38f;
        inner_products<U>(q + first, q, room, n, d, [&](long j, int u, vec logit) {
            top[u] = larger(top[u], logit);
            store(maps + (j * U + u) * LANES, logit);
        });
        for (long j = 0; j < n; j += TOGETHER) {
            UNROLL for (int u = 0; u < U; u++)
                store(maps + (j / TOGETHER * U + u) * LANES, factors([&](long i) {
                    const vec p = exponential(load(maps + ((j + i) * U + u) * LANES) - top[u]);
                    sum[u] += p;
                    return p;
                }));
        }
        if (sums)
            for (int u = 0; u < U; u++)
                for (int i = 0; i < LANES; i++) sums[first + u * LANES + i] = top[u][i] + __builtin_logf(sum[u][i]);
        UNROLL for (int u = 0; u < U; u++) sum[u] = 1.f / sum[u];
        weighted<U>(maps, v, room, n, d, sum, out + first);
    }
}

// Neighbouring tokens in pairs, in place.
INLINE void pair_tokens(float *x, long numbers) {
#ifdef BF16
    for (long at = 0; at < numbers; at += 2 * LANES) store(x + at / 2, rounded(load(x + at), load(x + at + LANES)));
#endif
}

// Attend in the windows of a task of one group: project x (windows.size) to queries and values, or to values where the
// queries of an earlier module are there, and write the result to `out`: d lines of such a map. Logits reach hundreds,
// so that queries are numbers and no pairs.
//
// queries: [task][d][room()], written or read; or null.
static void attend(const float *x, float *out, float *queries, bool shares, const Windows &windows, long task, long d,
                   const Projection &projection, float *scratch) {
    const long c = windows.size.c, room = windows.room(), n = windows.tokens();
    float *tokens = scratch, *own = tokens + c * room, *v = own + d * room, *result = v + d * room;
    float *packed = result + d * room, *maps = packed + (FACTORS == PAIRS ? c / 2 * room : 0);
    float *q = queries ? queries + task * d * room : own;
    cut(x, windows, task, c, tokens);
    if (!shares) project<SINGLE>(tokens, windows, task, projection.query_weights, projection.query_bias, c, d, q);
    long stride = room;
    const float *lines = lines_of_factors(tokens, stride, packed, c, room / LANES);
    project(lines, windows, task, projection.value_weights, projection.value_bias, c, d, v);
    pair_tokens(v, d * room);
    for (long j = 0; j < windows.number(task); j++)
        (n % (2 * LANES) ? attention<1> : attention<2>)(q + j * n, v + j * n / TOGETHER, room, n, d, maps,
                                                        result + j * n, nullptr);
    paste(result, windows, task, d, out);
}

}  // namespace NAMESPACE
