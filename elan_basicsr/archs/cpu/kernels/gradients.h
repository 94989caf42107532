// What training needs beside: 1x1 convolutions that keep their output, and backward passes.
//
// Sums over pixels are made for each slot (`Piece`) and added in their order, so that the same slots give the same bits.
namespace NAMESPACE {

INLINE float total(vec v) {
    UNROLL for (int step = LANES / 2; step; step /= 2) {
        ivec other;
        UNROLL for (int i = 0; i < LANES; i++) other[i] = i ^ step;
        v += __builtin_shuffle(v, other);
    }
    return v[0];
}

// Rows of a map whose products over pixels are summed at a time: as many as leave `lines` of them in the cache.
INLINE long rows_at_a_time(const Map &size, long lines) {
    const long rows = 65536 / (size.pitch * lines);
    return rows < 1 ? 1 : rows > 16 ? 16 : rows;
}

// Lines of some rows: line i of row r starts at `at + r * row + i * line`.
struct Lines {
    const float *at;
    long row, line, number;
};

INLINE long filled(long lines) { return (lines + LANES - 1) / LANES * LANES; }

// Write the pixels of some lines (n, pitch) as columns of channels, (w, filled(n)); what fills up is zero.
INLINE void transpose(Lines a, long rows, long w, float *to) {
    const long columns = filled(a.number);
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < a.number; k += LANES)
            for (long p = 0; p < w; p += LANES) {
                vec v[LANES];
                UNROLL for (int i = 0; i < LANES; i++) v[i] =
                    k + i < a.number ? load(a.at + r * a.row + (k + i) * a.line + p) : vec{};
                UNROLL for (int step = 1; step < LANES; step *= 2) {
                    ivec upper, lower;
                    UNROLL for (int i = 0; i < LANES; i++) {
                        upper[i] = i & step ? LANES + i - step : i;
                        lower[i] = i & step ? LANES + i : i + step;
                    }
                    UNROLL for (int i = 0; i < LANES; i++) {
                        if (i & step) continue;
                        const vec x = v[i], y = v[i + step];
                        v[i] = __builtin_shuffle(x, y, upper);
                        v[i + step] = __builtin_shuffle(x, y, lower);
                    }
                }
                UNROLL for (int i = 0; i < LANES; i++) store(to + (r * w + p + i) * columns + k, v[i]);
            }
}

// sums[i][j] += sum over the pixels of `rows` rows of a[i] * b[j], N of i and U vectors of j. b: columns of channels.
template <int N, int U>
inline void add_products(Lines a, const float *b, long columns, long rows, long w, float *sums) {
    vec products[N][U];
    UNROLL for (int i = 0; i < N; i++) {
        UNROLL for (int u = 0; u < U; u++) products[i][u] = load(sums + i * columns + u * LANES);
    }
    for (long r = 0; r < rows; r++)
        accumulate<N, U>(b + r * w * columns, columns, a.at + r * a.row, 1, a.line, w, products);
    UNROLL for (int i = 0; i < N; i++) {
        UNROLL for (int u = 0; u < U; u++) store(sums + i * columns + u * LANES, products[i][u]);
    }
}

template <int U>
INLINE void add_all_products(Lines a, const float *b, long columns, long rows, long w, float *sums) {
    constexpr int N = 6;
    long i = 0;
    for (; i + N <= a.number; i += N, a.at += N * a.line)
        add_products<N, U>(a, b, columns, rows, w, sums + i * columns);
    for (; i < a.number; i++, a.at += a.line) add_products<1, U>(a, b, columns, rows, w, sums + i * columns);
}

// sums[i][j] += sum over the pixels of the rows of a[i] * b[j], (n, filled(number of b)).
static void outer_product(Lines a, const float *b, long number, long rows, long w, float *sums) {
    const long columns = filled(number), vectors = columns / LANES;
    for (long u = 0; u < vectors; u += V) {
        const float *from = b + u * LANES;
        float *to = sums + u * LANES;
        switch (smaller(V, vectors - u)) {
        case 1: add_all_products<1>(a, from, columns, rows, w, to); break;
        case 2: add_all_products<2>(a, from, columns, rows, w, to); break;
        case 3: add_all_products<(V < 3 ? 1 : 3)>(a, from, columns, rows, w, to); break;
        case 4: add_all_products<(V < 4 ? 1 : 4)>(a, from, columns, rows, w, to); break;
        }
    }
}

// sums[i] += sum over the pixels of the rows of a[i].
static void line_sums(Lines a, long rows, long vectors, float *sums) {
    for (long i = 0; i < a.number; i++) {
        vec sum = {};
        for (long r = 0; r < rows; r++)
            for (long u = 0; u < vectors; u++) sum += load(a.at + i * a.line + r * a.row + u * LANES);
        sums[i] += total(sum);
    }
}

// The numbers of a slot, which begin at zero.
INLINE float *cleared(float *sums, const Piece &piece, long numbers) {
    return (float *)memset(sums + piece.slot * numbers, 0, numbers * 4);
}

// totals[i][j] = the sum over slots of [slot][i][j], or totals[j][i]; rows of `columns` numbers lie `line` apart in
// slots. Few are added sooner than threads have met.
static void add_slots(const float *sums, float *totals, long slots, long rows, long columns, long line, bool transposed,
                      long threads) {
    constexpr long some = 512, few = 1 << 22;
    long next = 0;
    in_threads(slots * rows * line > few ? threads : 1, [&](long) {
        for (long i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < rows;)
            for (long first = 0; first < columns; first += some) {
                const long number = smaller(some, columns - first);
                const float *from = sums + i * line + first;
                float sum[some];
                memcpy(sum, from, number * 4);
                for (long slot = 1; slot < slots; slot++)
                    for (long j = 0; j < number; j++) sum[j] += from[slot * rows * line + j];
                for (long j = 0; j < number; j++)
                    totals[transposed ? (first + j) * rows + i : i * columns + first + j] = sum[j];
            }
    });
}

INLINE Lines lines_of(const float *map, const Map &size, long row) {
    return {map + row * size.row(), size.row(), size.pitch, size.c};
}

constexpr auto nothing = [](long) { return Needs{NONE, NONE}; };

// Memory of each thread's own.
struct Scratch {
    float *memory;
    long each;
    float *of(long thread) const { return memory + thread * each; }
};

// out = weights shift(x) + bias in the rows of a piece, added to `residual` or else through a ReLU; out has n lines.
static void convolve(const float *x, float *out, const float *residual, const Map &size, long n, const float *weights,
                     const float *bias, const Piece &piece, float *packed) {
    const Map to_size = size.with(n);
    for (long y = piece.begin; y < piece.end; y++)
        for (long u = 0; u < size.vectors(); u += V) {
            const long vectors = smaller(V, size.vectors() - u), at = y * to_size.row() + u * LANES;
            pack_shifted<false>(rows_at(x, size, y), size.pitch, size.c, size.w, u, vectors, packed, PIXELS);
            if (residual) copy_lines(residual + at, size.pitch, out + at, size.pitch, n, vectors);
            (residual ? product<ADD> : product<RELU>)(vectors, packed, PIXELS, weights, bias, size.c, n, out + at,
                                                      size.pitch);
        }
}

// out = x + the local features of x; hidden: the widened map; sums: of out over its pixels, [c] in each slot.
static void features_forward(const float *x, float *hidden, float *out, const Map &size, long wide,
                             const float *weights0, const float *bias0, const float *weights1, const float *bias1,
                             float *sums, Scratch scratch, const Split &split) {
    in_bands(size, split, 2, [](long) { return Needs{BESIDE, BESIDE}; },
             [&](const Piece &piece, long thread) {
                 float *mine = scratch.of(thread);
                 if (!piece.stage) return convolve(x, hidden, nullptr, size, wide, weights0, bias0, piece, mine);
                 convolve(hidden, out, x, size.with(wide), size.c, weights1, bias1, piece, mine);
                 line_sums(lines_of(out, size, piece.begin), piece.end - piece.begin, size.vectors(),
                           cleared(sums, piece, size.c));
             });
}

// Pack rows of a shifted map, or of a gradient on its way back, each (c, pitch).
template <bool BACK>
INLINE void pack_rows(const float *map, const Map &size, long first, long rows, float *to) {
    for (long y = 0; y < rows; y++)
        pack_shifted<BACK>(rows_at(map, size, first + y), size.pitch, size.c, size.w, 0, size.vectors(),
                           to + y * size.row(), size.pitch);
}

// A convolution, backwards: the gradients of its weights [n][filled(c)] and bias [n] in each slot.
struct OfConvolution {
    float *weights, *bias;
};

// Local features backwards. The second convolution first: grad, the gradient of its output, gives of_far, that of its
// shifted input.
static void features_back1(const float *grad, const float *hidden, float *of_far, const Map &size, long wide,
                           const float *weights, OfConvolution sums, const Piece &piece, float *scratch) {
    const Map wide_size = size.with(wide);
    const long step = rows_at_a_time(size, wide);
    float *far = scratch, *columns = far + step * wide_size.row();
    float *of_weights = cleared(sums.weights, piece, wide * filled(size.c)), *of_bias = cleared(sums.bias, piece, size.c);
    for (long first = piece.begin; first < piece.end; first += step) {
        const long rows = smaller(step, piece.end - first);
        pack_rows<false>(hidden, wide_size, first, rows, far);
        const Lines of_out = lines_of(grad, size, first);
        transpose(of_out, rows, size.w, columns);
        outer_product(lines_of(far, wide_size, 0), columns, size.c, rows, size.w, of_weights);
        line_sums(of_out, rows, size.vectors(), of_bias);
        product_of_rows<WRITE>(grad + first * size.row(), size, rows, weights, nullptr, wide,
                               of_far + first * wide_size.row());
    }
}

// The first one, through the ReLU: gives of_near, the gradient of its shifted input.
static void features_back0(const float *x, const float *hidden, const float *of_far, float *of_near, const Map &size,
                           long wide, const float *weights, OfConvolution sums, const Piece &piece, float *scratch) {
    const Map wide_size = size.with(wide);
    const long step = rows_at_a_time(size, wide);
    float *of_hidden = scratch, *near = of_hidden + step * wide_size.row(), *columns = near + step * size.row();
    float *of_weights = cleared(sums.weights, piece, wide * filled(size.c)), *of_bias = cleared(sums.bias, piece, wide);
    for (long first = piece.begin; first < piece.end; first += step) {
        const long rows = smaller(step, piece.end - first);
        pack_rows<true>(of_far, wide_size, first, rows, of_hidden);
        const float *passed = hidden + first * wide_size.row();
        for (long i = 0; i < rows * wide_size.row(); i += LANES)
            store(of_hidden + i, load(passed + i) <= 0 ? vec{} : load(of_hidden + i));
        pack_rows<false>(x, size, first, rows, near);
        transpose(lines_of(near, size, 0), rows, size.w, columns);
        const Lines of_out = lines_of(of_hidden, wide_size, 0);
        outer_product(of_out, columns, size.c, rows, size.w, of_weights);
        line_sums(of_out, rows, size.vectors(), of_bias);
        product_of_rows<WRITE>(of_hidden, wide_size, rows, weights, nullptr, size.c, of_near + first * size.row());
    }
}

// out = grad + the shifted map's gradient, shifted back.
static void add_shifted_back(const float *grad, const float *of_near, float *out, const Map &size,
                             const Piece &piece) {
    for (long y = piece.begin; y < piece.end; y++) {
        float *to = out + y * size.row();
        pack_rows<true>(of_near, size, y, 1, to);
        for (long i = 0; i < size.row(); i += LANES) store(to + i, load(to + i) + load(grad + y * size.row() + i));
    }
}

// `features_forward` backwards. of_far (wide), of_near: memory; the second convolution's weights and sums come second.
static void features_back(const float *x, const float *hidden, const float *grad, float *of_far, float *of_near,
                          float *out, const Map &size, long wide, const float *weights0, const float *weights1,
                          OfConvolution sums0, OfConvolution sums1, Scratch scratch, const Split &split) {
    in_bands(size, split, 3, [](long) { return Needs{BESIDE, BESIDE}; },
             [&](const Piece &piece, long thread) {
                 float *mine = scratch.of(thread);
                 switch (piece.stage) {
                 case 0: return features_back1(grad, hidden, of_far, size, wide, weights1, sums1, piece, mine);
                 case 1: return features_back0(x, hidden, of_far, of_near, size, wide, weights0, sums0, piece, mine);
                 default: return add_shifted_back(grad, of_near, out, size, piece);
                 }
             });
}

// z = weights x + bias, and sums over its pixels of its squares, [n] in each slot.
static void project_squares(const float *x, float *z, const Map &size, long n, const float *weights, const float *bias,
                            float *sums, const Split &split) {
    const Map z_size = size.with(n);
    in_bands(size, split, 1, nothing, [&](const Piece &piece, long) {
        float *squares = cleared(sums, piece, n);
        product_of_rows<WRITE>(x + piece.begin * size.row(), size, piece.end - piece.begin, weights, bias, n,
                               z + piece.begin * z_size.row());
        for (long y = piece.begin; y < piece.end; y++)
            for (long i = 0; i < n; i++) {
                const float *line = z + y * z_size.row() + i * size.pitch;
                vec sum = {};
                for (long u = 0; u < size.vectors(); u++) sum += load(line + u * LANES) * load(line + u * LANES);
                squares[i] += total(sum);
            }
    });
}

// Sums over pixels of grad[i] * z[i] and grad[i], [c] in each slot: gradients of what BatchNorm scales z by and adds.
static void line_products(const float *grad, const float *z, const Map &size, float *sums, float *grad_sums,
                          const Piece &piece) {
    sums = cleared(sums, piece, size.c), grad_sums = cleared(grad_sums, piece, size.c);
    for (long y = piece.begin; y < piece.end; y++)
        for (long i = 0; i < size.c; i++) {
            const float *a = grad + y * size.row() + i * size.pitch, *b = z + y * size.row() + i * size.pitch;
            vec sum = {}, grad_sum = {};
            for (long u = 0; u < size.vectors() * LANES; u += LANES) {
                sum += load(a + u) * load(b + u);
                grad_sum += load(a + u);
            }
            sums[i] += total(sum);
            grad_sums[i] += total(grad_sum);
        }
}

// Sums over pixels of grad[i] * y[j] and grad[i]: the gradients of a convolution from y to what grad is the gradient of.
static void products(const float *grad, const float *y, const Map &size, OfConvolution sums, const Piece &piece,
                     float *columns) {
    const long step = rows_at_a_time(size, size.c);
    float *of_weights = cleared(sums.weights, piece, size.c * filled(size.c));
    float *of_bias = cleared(sums.bias, piece, size.c);
    for (long first = piece.begin; first < piece.end; first += step) {
        const long rows = smaller(step, piece.end - first);
        transpose(lines_of(y, size, first), rows, size.w, columns);
        const Lines of_out = lines_of(grad, size, first);
        outer_product(of_out, columns, size.c, rows, size.w, of_weights);
        line_sums(of_out, rows, size.vectors(), of_bias);
    }
}

// BatchNorm and the convolution before it backwards. grad: the gradient of the normalised map; z: what was normalised,
// less its mean; both n lines, and scale * grad + through * z + bias is the gradient of z. Gives out, the gradient of x
// added to `residual`, and of weights, [n][filled(c)] in each slot.
static void norm_back(const float *grad, const float *z, const float *scale, const float *through, const float *bias,
                      const float *x, const float *mean, const float *residual, float *out, const Map &size, long n,
                      const float *weights, float *sums, Scratch scratch, const Split &split) {
    const Map z_size = size.with(n);
    const long step = rows_at_a_time(size, n);
    in_bands(size, split, 1, nothing, [&](const Piece &piece, long thread) {
        float *of_z = scratch.of(thread), *centred = of_z + step * z_size.row(), *columns = centred + step * size.row();
        float *of_weights = cleared(sums, piece, n * filled(size.c));
        for (long first = piece.begin; first < piece.end; first += step) {
            const long rows = smaller(step, piece.end - first);
            for (long y = 0; y < rows; y++)
                for (long i = 0; i < n; i++)
                    for (long u = 0; u < size.vectors(); u++) {
                        const long at = y * z_size.row() + i * size.pitch + u * LANES, from = first * z_size.row() + at;
                        store(of_z + at, load(grad + from) * scale[i] + (load(z + from) * through[i] + bias[i]));
                    }
            for (long y = 0; y < rows; y++)  // x has a mean for which sums of products would lose digits
                for (long k = 0; k < size.c; k++)
                    for (long u = 0; u < size.vectors(); u++) {
                        const long at = y * size.row() + k * size.pitch + u * LANES;
                        store(centred + at, load(x + first * size.row() + at) - mean[k]);
                    }
            transpose(lines_of(centred, size, 0), rows, size.w, columns);
            outer_product(lines_of(of_z, z_size, 0), columns, size.c, rows, size.w, of_weights);
            memcpy(out + first * size.row(), residual + first * size.row(), rows * size.row() * 4);
            product_of_rows<ADD>(of_z, z_size, rows, weights, nullptr, size.c, out + first * size.row());
        }
    });
}

// d lines of a map with n lines before BatchNorm, which scales them and adds `offset`.
struct Normalised {
    const float *map;
    long n;
    const float *scale, *offset;
};

INLINE void cut_normalised(Normalised of, const Windows &windows, long task, long d, float *tokens) {
    const long room = windows.room();
    cut(of.map, {windows.size.with(of.n), windows.edge, windows.shift}, task, d, tokens);
    for (long k = 0; k < d; k++, tokens += room)
        for (long i = 0; i < room; i += LANES) store(tokens + i, load(tokens + i) * of.scale[k] + of.offset[k]);
}

// The groups of channels and their windows. For each: sums, the logarithms of softmax's sums [task][room].
struct Groups {
    const Map size;
    long number;
    const int64_t *edges;
    bool shifted;
    float *const *sums;
    Windows windows(long g) const { return {size, edges[g], shifted ? edges[g] / 2 : 0}; }
};

// d lines of the queries or values of group g. A map has queries and values of each group, or values alone.
INLINE Normalised lines_of_group(const Normalised &of, const Groups &groups, long g, bool values) {
    const long d = groups.size.c / groups.number, width = of.n / groups.number;
    const long first = g * width + (values ? width - d : 0);
    return {of.map + first * groups.size.pitch, of.n, of.scale + first, of.offset + first};
}

// Attend in the windows of a task of a group: as `attend`, with queries and values projected already. out: d lines.
static void attend_normalised(const Normalised &queries, const Normalised &values, float *out, float *sums,
                              const Windows &windows, long task, long d, float *scratch) {
    const long room = windows.room(), n = windows.tokens();
    float *q = scratch, *v = q + d * room, *result = v + d * room;
    cut_normalised(queries, windows, task, d, q);
    cut_normalised(values, windows, task, d, v);
    for (long j = 0; j < windows.number(task) * n; j += n)
        (n % (2 * LANES) ? attention<1> : attention<2>)(q + j, v + j, room, n, d, result + d * room, result + j,
                                                        sums + task * room + j);
    paste(result, windows, task, d, out);
}

// out = x + weights attended + bias, where `attended` is what attention of all groups gives.
static void attention_forward(const Normalised &queries, const Normalised &values, float *attended, const float *x,
                              float *out, const Groups &groups, const float *weights, const float *bias,
                              Scratch scratch, const Split &split) {
    const Map &size = groups.size;
    const long d = size.c / groups.number;
    in_bands(size, split, 2, [&](long) { return Needs{groups.shifted ? ROUND : NONE, NONE}; },
             [&](const Piece &piece, long thread) {
                 if (piece.stage) {
                     const long begin = piece.begin * size.row(), rows = piece.end - piece.begin;
                     memcpy(out + begin, x + begin, rows * size.row() * 4);
                     return product_of_rows<ADD>(attended + begin, size, rows, weights, bias, size.c, out + begin);
                 }
                 for (long g = 0; g < groups.number; g++) {
                     const Windows windows = groups.windows(g);
                     const Normalised q = lines_of_group(queries, groups, g, false);
                     const Normalised v = lines_of_group(values, groups, g, true);
                     windows.each(piece, split.pieces, [&](long task) {
                         attend_normalised(q, v, attended + g * d * size.pitch, groups.sums[g], windows, task, d,
                                           scratch.of(thread));
                     });
                 }
             });
}

// One window of n tokens backwards. Column j of the attention map is exp(q_i q_j - sums_i) for all i; lanes are j.
// Queries are keys as well, so that the logits are symmetric: what row j gives to the gradient of query j needs no
// other layout, only the exponentials with sums_j.
//
// grad, v: of this module, [d]; of_v is written. If of_q: grads, values of all modules [all] with their dots.
template <int U>
inline void attention_back(const float *q, const float *grad, const float *sums, const float *grads,
                           const float *values, const float *dots, long room, long n, long d, long all, float *maps,
                           float *of_q, float *of_v) {
    vec one[U];
    UNROLL for (int u = 0; u < U; u++) one[u] = vec{} + 1.f;
    float *logits = maps + n * U * LANES;
    for (long first = 0; first < n; first += U * LANES) {
        inner_products<U>(q + first, q, room, n, d,
                          [&](long i, int u, vec logit) { store(logits + (i * U + u) * LANES, logit); });
        for (long i = 0; i < n; i++)
            UNROLL for (int u = 0; u < U; u++)
                store(maps + (i * U + u) * LANES, exponential(load(logits + (i * U + u) * LANES) - sums[i]));
        weighted<U>(maps, grad, room, n, d, one, of_v + first);
        if (!of_q) continue;
        inner_products<U>(values + first, grads, room, n, all, [&](long i, int u, vec of_map) {
            float *at = maps + (i * U + u) * LANES;
            store(at, load(at) * (of_map - dots[i]));
        });
        for (long i = 0; i < n; i++) UNROLL for (int u = 0; u < U; u++) {
                float *at = logits + (i * U + u) * LANES;
                store(at, exponential(load(at) - load(sums + first + u * LANES)));
            }
        inner_products<U>(grads + first, values, room, n, all, [&](long i, int u, vec of_map) {
            float *at = maps + (i * U + u) * LANES;
            store(at, load(at) + load(logits + (i * U + u) * LANES) * (of_map - load(dots + first + u * LANES)));
        });
        weighted<U>(maps, q, room, n, d, one, of_q + first);
    }
}

// `attend_normalised` backwards. grad: the gradient of the projection out of attention (c); out_weights: that
// projection's for this group, as [d][c]; result: the module's attention (d lines); of_queries, of_values: d lines, the
// former null for a module that shares.
static void attend_back(const Normalised &queries, const Normalised &values, const float *grad, const float *result,
                        const float *sums, float *of_queries, float *of_values, const Shared &shared, long module,
                        const Windows &windows, long task, long d, const float *out_weights, float *scratch) {
    const long c = windows.size.c, room = windows.room(), n = windows.tokens(), all = shared.modules * d;
    const Windows target = {windows.size.with(values.n), windows.edge, windows.shift};
    float *tokens = scratch, *q = tokens + c * room;
    float *of_q = of_queries ? q + d * room : nullptr, *of_v = q + 2 * d * room, *maps = q + 3 * d * room;
    float *grads = shared.grads + task * all * room, *all_values = shared.values + task * all * room;
    float *mine = grads + module * d * room, *dots = shared.dots + task * room;
    cut_normalised(queries, windows, task, d, q);
    cut_normalised(values, windows, task, d, all_values + module * d * room);
    cut(grad, windows, task, c, tokens);
    project(tokens, windows, task, out_weights, nullptr, c, d, mine);
    cut(result, windows, task, d, tokens);
    if (module == shared.modules - 1) memset(dots, 0, room * 4);
    for (long k = 0; k < d; k++)
        for (long i = 0; i < room; i += LANES)
            store(dots + i, load(dots + i) + load(mine + k * room + i) * load(tokens + k * room + i));
    for (long j = 0; j < windows.number(task) * n; j += n)
        (n % (2 * LANES) ? attention_back<1> : attention_back<2>)(q + j, mine + j, sums + task * room + j, grads + j,
                                                                  all_values + j, dots + j, room, n, d, all, maps,
                                                                  of_q ? of_q + j : nullptr, of_v + j);
    if (of_q) paste(of_q, target, task, d, of_queries);
    paste(of_v, target, task, d, of_values);
}

// What `attention_backward` sums up, in each slot: gradients of the projection out, and of BatchNorm's scale and offset.
struct OfAttention {
    OfConvolution out;
    float *scale, *offset;
};

// `attention_forward` backwards, as far as `of_normalised`, the gradient of the normalised map. shared, out_weights: of
// each group.
static void attention_backward(const Normalised &queries, const Normalised &values, const float *grad,
                               const float *attended, float *of_normalised, const Groups &groups, const Shared *shared,
                               long module, const float *const *out_weights, const OfAttention &sums, Scratch scratch,
                               const Split &split) {
    const Map &size = groups.size;
    const long d = size.c / groups.number, width = values.n / groups.number;
    in_bands(size, split, 2, [&](long) { return Needs{groups.shifted ? ROUND : NONE, NONE}; },
             [&](const Piece &piece, long thread) {
                 if (piece.stage)
                     return line_products(of_normalised, values.map, size.with(values.n), sums.scale, sums.offset,
                                          piece);
                 products(grad, attended, size, sums.out, piece, scratch.of(thread));
                 for (long g = 0; g < groups.number; g++) {
                     const Windows windows = groups.windows(g);
                     const Normalised q = lines_of_group(queries, groups, g, false);
                     const Normalised v = lines_of_group(values, groups, g, true);
                     float *both = of_normalised + g * width * size.pitch;
                     windows.each(piece, split.pieces, [&](long task) {
                         attend_back(q, v, grad, attended + g * d * size.pitch, groups.sums[g], module ? nullptr : both,
                                     both + (width - d) * size.pitch, shared[g], module, windows, task, d,
                                     out_weights[g], scratch.of(thread));
                     });
                 }
             });
}

}  // namespace NAMESPACE
