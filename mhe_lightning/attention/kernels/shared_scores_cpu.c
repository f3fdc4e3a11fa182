/* Attention of heads that share their scores, for CPUs, in float32: shared_forward and shared_backward of blocks.py, over
 * tiles that stay in the caches.
 *
 *     H_i = E (w_i v) / (E w_i),   E = exp(q k^T - level),   w_i = exp(r_i)
 *
 * All matrix products run through one micro-kernel, MR x NR numbers held in registers (Goto & van de Geijn 2008, Anatomy
 * of High-Performance Matrix Multiplication). Its second operand is packed once a call, in panels of NR columns, where
 * separate products would pack it again for every tile; what a causal mask hides is skipped in steps of MR queries.
 *
 * Written with B batch rows, T queries, S keys, n heads of size d. Weighed values and their gradients are n*d columns,
 * the weights (or the gradients of the sums) n more, filled with zeros up to a multiple of NR.
 *
 * Which numbers are added in which order depends on the sizes alone, never on the number of threads.
 */
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined __AVX512F__
#define LANES 16
#define MR 12
#elif defined __AVX2__ && defined __FMA__ || defined __ARM_NEON
#define LANES 8 /* of NEON two registers */
#define MR 6
#else
#error "no registers for sums of 6 x 16 numbers here"
#endif
#define NR (2 * LANES)

enum {
    QUERIES = 96,  /* of a tile, forward */
    DEPTH = 512,   /* of a product before its sums are put down, so that NR columns of it stay in a near cache */
    PANELS = 7,    /* the same of a product of panels, each NR deep; of 4 to 32 the fastest at D = 768, n = 12 */
    KEYS = 96,     /* of a block, backward; a multiple of NR */
    ROWS = 132,    /* queries that a block of keys meets at once, backward; a multiple of MR */
    LINES = 16,    /* tokens that are put into panels at once; fewer than KEYS */
    PARTS = 8,     /* of the keys, whose gradients of queries are added up apart */
    MOST_KEPT = 16 << 20, /* numbers in memory that is kept between calls */
};

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float in_memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef ptrdiff_t size;

typedef struct {
    float *data;
    size row, token; /* strides in numbers; those of a token are next to each other */
} matrix;

typedef struct {
    size B, T, S, n, d;
    matrix q, k, v, r;   /* (B, T, d), (B, S, d) twice, (B, S, n) */
    const uint8_t *mask; /* 1 = may attend, or NULL */
    size mask_row, mask_query, mask_key;
    int is_causal, threads;
    float scale;         /* of the scores */
} problem;

static size least(size a, size b) { return a < b ? a : b; }
static size rounded(size a, size unit) { return (a + unit - 1) / unit * unit; }

/* Memory for the packed operands. What a call gives back is kept for the next one, up to a size: the system takes longer
 * to hand over new pages than a short call computes. */
typedef struct {
    size count;
    float numbers[] __attribute__((aligned(64)));
} space;

static space *kept;

static space *take(size count) {
    space *found = __atomic_exchange_n(&kept, NULL, __ATOMIC_ACQUIRE);
    if (found && found->count >= count) return found;
    free(found);
    found = aligned_alloc(64, sizeof(space) + rounded(4 * count, 64));
    if (found) found->count = count;
    return found;
}

static void give_back(space *s) {
    if (s && s->count <= MOST_KEPT) s = __atomic_exchange_n(&kept, s, __ATOMIC_ACQ_REL);
    free(s);
}

static inline vec load(const float *p) { return *(const in_memory *)p; }
static inline void store(float *p, vec x) { *(in_memory *)p = x; }
static inline vec all(float x) { return x - (vec){0}; }
static inline vec chosen(ints which, vec a, vec b) { return (vec)(((ints)a & which) | ((ints)b & ~which)); }

/* e^x for x up to 80 to an ulp (the polynomial of the Cephes library); 0 where that is no normal number. */
static inline vec exponential(vec x) {
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the lowest bits */
    vec z = x * 1.44269504f + magic, m = z - magic;
    vec r = x - m * 0.693359375f + m * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vec y = (vec)((ints)p + ((ints)z << 23));
    y = chosen(x < -87.3f, (vec){0}, y);
    return chosen(x == x, y, x);
}

/* Loops over the registers of a micro-kernel, written out (MR is 12 at most): gcc keeps an array in registers only if all
 * its indices are constants. */
#define WRITTEN_OUT _Pragma("GCC unroll 12")

/* Sums of a micro-kernel begin at zero; what they are added to is fetched meanwhile. */
static inline __attribute__((always_inline)) void start(int rows, vec sums[MR][2], const float *c, size c_row) {
    WRITTEN_OUT for (int i = 0; i < rows; i++) {
        __builtin_prefetch(c + i * c_row, 1);
        sums[i][0] = sums[i][1] = (vec){0};
    }
}

/* Adds a column (rows), a_row apart, times a row (NR). */
static inline __attribute__((always_inline)) void step(int rows, vec sums[MR][2], const float *a, size a_row, const float *b) {
    vec left = load(b), right = load(b + LANES);
    WRITTEN_OUT for (int i = 0; i < rows; i++) {
#ifdef __x86_64__ /* gcc would load b again for every row, and, of several steps, put sums into memory */
        vec x;
        __asm__(
            "vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
            : "+&v"(sums[i][0]), "+v"(sums[i][1]), "=&v"(x)
            : "m"(a[i * a_row]), "v"(left), "v"(right)
        );
#else
        sums[i][0] += a[i * a_row] * left;
        sums[i][1] += a[i * a_row] * right;
#endif
    }
}

static inline __attribute__((always_inline)) void finish(int rows, vec sums[MR][2], float *c, size c_row, int add) {
    WRITTEN_OUT for (int i = 0; i < rows; i++)
        WRITTEN_OUT for (int j = 0; j < 2; j++) {
            float *out = c + i * c_row + j * LANES;
            store(out, add ? load(out) + sums[i][j] : sums[i][j]);
        }
}

/* C (rows, NR) = or += A (rows, depth) B, B packed. A(i, k) lies at a[i * a_row + k * a_depth]. */
static inline __attribute__((always_inline)) void tile(
    int rows, size depth, const float *a, size a_row, size a_depth, const float *b, float *c, size c_row, int add
) {
    vec sums[MR][2];
    start(rows, sums, c, c_row);
    for (size k = 1; k < depth; k += 2, a += 2 * a_depth, b += 2 * NR) {
        step(rows, sums, a, a_row, b);
        step(rows, sums, a + a_depth, a_row, b + NR);
    }
    if (depth % 2) step(rows, sums, a, a_row, b);
    finish(rows, sums, c, c_row, add);
}

/* The same of A in panels of NR of its columns, `panel` numbers apart, its rows NR apart; depth in panels. */
static inline __attribute__((always_inline)) void tile_of_panels(
    int rows, size depth, const float *a, size panel, const float *b, float *c, size c_row, int add
) {
    vec sums[MR][2];
    start(rows, sums, c, c_row);
    for (size p = 0; p < depth; p++, a += panel)
        for (size k = 0; k < NR; k += 2, b += 2 * NR) {
            step(rows, sums, a + k, NR, b);
            step(rows, sums, a + k + 1, NR, b + NR);
        }
    finish(rows, sums, c, c_row, add);
}

/* Each number of rows is code of its own, whose sums stay in registers. */
#if MR == 6
#define REMAINDERS(call) case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; \
    case 4: call(4); break; case 5: call(5); break;
#else
#define REMAINDERS(call) case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; \
    case 4: call(4); break; case 5: call(5); break; case 6: call(6); break; case 7: call(7); break; \
    case 8: call(8); break; case 9: call(9); break; case 10: call(10); break; case 11: call(11); break;
#endif
#define BY_ROWS(rows, call) switch (rows) { case MR: call(MR); break; REMAINDERS(call) }

/* A's rows are apart by a_row, what is summed over lies side by side. */
static void by_rows(int rows, size depth, const float *a, size a_row, const float *b, float *c, size c_row, int add) {
#define CALL(r) tile(r, depth, a, a_row, 1, b, c, c_row, add)
    BY_ROWS(rows, CALL)
#undef CALL
}

/* A transposed: its rows lie side by side. */
static void by_columns(int rows, size depth, const float *a, size a_depth, const float *b, float *c, size c_row, int add) {
#define CALL(r) tile(r, depth, a, 1, a_depth, b, c, c_row, add)
    BY_ROWS(rows, CALL)
#undef CALL
}

static void by_panels(int rows, size depth, const float *a, size panel, const float *b, float *c, size c_row, int add) {
#define CALL(r) tile_of_panels(r, depth, a, panel, b, c, c_row, add)
    BY_ROWS(rows, CALL)
#undef CALL
}

static float *of_token(const matrix *m, size b, size t) { return m->data + b * m->row + t * m->token; }

/* Numbers from a panel of columns of so many tokens to the next: an odd number of lines of a cache, so that panels do
 * not all fall upon the same few of its sets. */
static size apart(size tokens) { return (tokens | 1) * NR; }

/* Packed columns: m[t, j] * factor at out[(j / NR) * apart(tokens) + t * NR + j % NR], for t from begin to end. */
static void pack_columns(const matrix *m, size b, size begin, size end, size tokens, size width, float factor, float *out) {
    for (size j = 0; j < width; j += NR, out += apart(tokens))
        for (size t = begin; t < end; t++) {
            const float *x = of_token(m, b, t) + j;
            size count = least(NR, width - j);
            for (size l = 0; l < count; l++) out[t * NR + l] = x[l] * factor;
            memset(out + t * NR + count, 0, 4 * (NR - count));
        }
}

/* Packed transpose of NR tokens from t on: m[t + l, c] * factor at out[c * NR + l]; zeros after the last token. */
static void pack_tokens(const matrix *m, size b, size t, size tokens, size width, float factor, float *out) {
    for (size l = 0; l < NR; l++)
        for (size c = 0; c < width; c++) out[c * NR + l] = t + l < tokens ? of_token(m, b, t + l)[c] * factor : 0;
}

/* w (keys, heads up to a multiple of LANES) = exp(r), of keys begin to end. */
static void weigh(const problem *p, size b, size begin, size end, float *w) {
    size width = rounded(p->n, LANES);
    for (size s = begin; s < end; s++) {
        float *x = w + s * width;
        memcpy(x, of_token(&p->r, b, s), 4 * p->n);
        memset(x + p->n, 0, 4 * (width - p->n));
        for (size i = 0; i < width; i += LANES) store(x + i, exponential(load(x + i)));
    }
}

/* Keys that query t sees are those before it. */
static size seen(const problem *p, size t) { return p->is_causal ? least(t + 1, p->S) : p->S; }

static int hidden(const problem *p, size b, size t, size s) {
    return !p->mask[b * p->mask_row + t * p->mask_query + s * p->mask_key];
}

static size columns_of(const problem *p) { return rounded(p->n * p->d + p->n, NR); }

/* Lines (count, columns) of tokens from t on into panels of `tokens`. */
static void put_lines(const float *lines, size count, size columns, size t, size tokens, float *out) {
    for (size j = 0; j < columns; j += NR, out += apart(tokens))
        for (size l = 0; l < count; l++) memcpy(out + (t + l) * NR, lines + l * columns + j, 4 * NR);
}

typedef struct {
    float *keys;   /* k^T * scale: (S / NR, d, NR) */
    float *values; /* w v and w: (columns / NR, apart(S)) */
    float *w;      /* (S, heads up to a multiple of LANES) */
} forward_row;

static void pack_forward(const problem *p, const forward_row *row, size b, size begin, size end, float *lines) {
    size d = p->d, nd = p->n * d, width = rounded(p->n, LANES), columns = columns_of(p);
    weigh(p, b, begin, end, row->w);
    for (size s = begin; s < end; s += NR) pack_tokens(&p->k, b, s, p->S, d, p->scale, row->keys + s * d);
    for (size s = begin, count; s < end; s += count) {
        count = least(LINES, end - s);
        for (size l = 0; l < count; l++) {
            const float *v = of_token(&p->v, b, s + l), *w = row->w + (s + l) * width;
            float *line = lines + l * columns;
            for (size i = 0; i < p->n; i++)
                for (size c = 0; c < d; c++) line[i * d + c] = w[i] * v[c];
            memcpy(line + nd, w, 4 * p->n);
        }
        put_lines(lines, count, columns, s, p->S, row->values);
    }
}

/* -inf in place of what query t may not see of scores x, which are of keys first to last. */
static void hide(const problem *p, size b, size t, size first, size last, float *x) {
    size limit = seen(p, t);
    if (p->mask)
        for (size s = first; s < least(last, limit); s++)
            if (hidden(p, b, t, s)) x[s - first] = -INFINITY;
    for (size s = limit > first ? limit : first; s < last; s++) x[s - first] = -INFINITY;
}

/* Heads (B, T, n*d), the sums E w_i (B, T, n) and the level (B, T, 1). */
typedef struct {
    matrix heads, sums, level;
} results;

static void forward_tile(
    const problem *p, const forward_row *row, size b, size begin, float *scores, const results *out
) {
    size end = least(begin + QUERIES, p->T), n = p->n, d = p->d, nd = n * d, columns = columns_of(p);
    size most = seen(p, end - 1), width = rounded(most, NR) + NR; /* rows that a cache holds in different sets */
    float *sums = scores + QUERIES * (rounded(p->S, NR) + NR);
    for (size t = begin; t < end; t += MR) {
        size rows = least(MR, end - t), limit = rounded(seen(p, t + rows - 1), NR);
        for (size s = 0; s < limit; s += NR)
            by_rows(rows, d, of_token(&p->q, b, t), p->q.token, row->keys + s * d, scores + (t - begin) * width + s, width, 0);
        for (size r = t; r < t + rows; r++) {
            float *x = scores + (r - begin) * width, top = -INFINITY;
            vec tops = all(-INFINITY);
            hide(p, b, r, 0, limit, x);
            for (size s = 0; s < limit; s += LANES) tops = chosen(load(x + s) > tops, load(x + s), tops);
            for (size l = 0; l < LANES; l++) top = tops[l] > top ? tops[l] : top;
            if (top == -INFINITY) top = 0; /* no key in view: exp(-inf - 0) is 0 */
            for (size s = 0; s < limit; s += LANES) store(x + s, exponential(load(x + s) - top));
            *of_token(&out->level, b, r) = top;
        }
    }
    for (size from = 0; from < most; from += DEPTH)
        for (size j = 0; j < columns; j += NR)
            for (size t = begin; t < end; t += MR) {
                size rows = least(MR, end - t), to = least(from + DEPTH, seen(p, t + rows - 1));
                if (to > from)
                    by_rows(
                        rows, to - from, scores + (t - begin) * width + from, width, row->values + j / NR * apart(p->S) + from * NR,
                        sums + (t - begin) * columns + j, columns, from > 0
                    );
            }
    for (size t = begin; t < end; t++) {
        const float *x = sums + (t - begin) * columns;
        float *heads = of_token(&out->heads, b, t);
        memcpy(of_token(&out->sums, b, t), x + nd, 4 * n);
        for (size i = 0; i < n; i++) {
            float inverse = x[nd + i] == 0 ? 1 : 1 / x[nd + i];
            for (size c = i * d; c < (i + 1) * d; c++) heads[c] = x[c] * inverse;
        }
    }
}

/* Writes all results. Returns 0, or -1 if there is no memory. */
int shared_score_forward(const problem *p, const results *out) {
    size S = p->S, d = p->d, columns = columns_of(p), padded = rounded(S, NR), width = rounded(p->n, LANES);
    size blocks = (S + KEYS - 1) / KEYS, tiles = (p->T + QUERIES - 1) / QUERIES;
    size of_row = padded * d + columns / NR * apart(S) + rounded(S * width, NR);
    size of_thread = QUERIES * (padded + NR + columns); /* more than LINES * columns */
    space *memory = take(p->B * of_row + p->threads * of_thread);
    int state = memory ? 0 : -1;
    if (memory) {
        float *packed = memory->numbers, *own = packed + p->B * of_row;
#pragma omp parallel num_threads(p->threads)
        {
            float *mine = own + omp_get_thread_num() * of_thread;
            memset(mine, 0, 4 * LINES * columns); /* ends of lines stay zero */
#pragma omp for schedule(static)
            for (size unit = 0; unit < p->B * blocks; unit++) {
                size b = unit / blocks, begin = unit % blocks * KEYS;
                float *at = packed + b * of_row;
                forward_row row = {at, at + padded * d, at + of_row - rounded(S * width, NR)};
                pack_forward(p, &row, b, begin, least(begin + KEYS, S), mine);
            }
#pragma omp for schedule(dynamic, 1)
            for (size unit = 0; unit < p->B * tiles; unit++) {
                size b = unit % p->B, tile = tiles - 1 - unit / p->B; /* the longest first */
                float *at = packed + b * of_row;
                forward_row row = {at, at + padded * d, at + of_row - rounded(S * width, NR)};
                forward_tile(p, &row, b, tile * QUERIES, mine, out);
            }
        }
    }
    give_back(memory);
    return state;
}

/* Gradients by q (B, T, d), k, v (B, S, d) and r (B, S, n). */
typedef struct {
    matrix q, k, v, r;
} gradients;

typedef struct {
    float *keys;           /* k^T * scale: (S / NR, d, NR) */
    float *weighed;        /* (w v)^T and w^T: (S / NR, columns, NR) */
    float *w;              /* (S, heads up to a multiple of LANES) */
    float *key_columns;    /* k * scale: (d / NR, apart(S)) */
    float *query_columns;  /* q * scale: (d / NR, apart(T)) */
    float *heads;          /* grad / sums and the gradients of the sums: (columns / NR, apart(T)) */
} backward_row;

static backward_row backward_row_at(const problem *p, float *at) {
    size padded = rounded(p->S, NR), columns = columns_of(p), width = rounded(p->n, LANES), deep = rounded(p->d, NR);
    backward_row row;
    row.keys = at;
    row.weighed = row.keys + padded * p->d;
    row.w = row.weighed + padded * columns;
    row.key_columns = row.w + rounded(p->S * width, NR);
    row.query_columns = row.key_columns + deep / NR * apart(p->S);
    row.heads = row.query_columns + deep / NR * apart(p->T);
    return row;
}

static void pack_backward_keys(const problem *p, const backward_row *row, size b, size begin, size end, float *v) {
    size n = p->n, d = p->d, columns = columns_of(p), width = rounded(n, LANES);
    float w[NR];
    weigh(p, b, begin, end, row->w);
    pack_columns(&p->k, b, begin, end, p->S, d, p->scale, row->key_columns);
    for (size s = begin; s < end; s += NR) {
        float *out = row->weighed + s * columns;
        pack_tokens(&p->k, b, s, p->S, d, p->scale, row->keys + s * d);
        pack_tokens(&p->v, b, s, p->S, d, 1, v);
        for (size i = 0; i < n; i++) {
            for (size l = 0; l < NR; l++) w[l] = s + l < end ? row->w[(s + l) * width + i] : 0;
            for (size c = 0; c < d; c++)
                for (size l = 0; l < NR; l++) out[(i * d + c) * NR + l] = w[l] * v[c * NR + l];
            memcpy(out + (n * d + i) * NR, w, sizeof w);
        }
        memset(out + n * (d + 1) * NR, 0, 4 * NR * (columns - n * (d + 1)));
    }
}

static void pack_backward_queries(
    const problem *p, const results *found, const matrix *grad_heads, const backward_row *row, size b, size begin, size end,
    float *lines
) {
    size n = p->n, d = p->d, nd = n * d, columns = columns_of(p);
    pack_columns(&p->q, b, begin, end, p->T, d, p->scale, row->query_columns);
    for (size t = begin, count; t < end; t += count) {
        count = least(LINES, end - t);
        for (size l = 0; l < count; l++) {
            const float *grad = of_token(grad_heads, b, t + l), *heads = of_token(&found->heads, b, t + l);
            const float *sums = of_token(&found->sums, b, t + l);
            float *line = lines + l * columns;
            for (size i = 0; i < n; i++) {
                float inverse = sums[i] == 0 ? 0 : 1 / sums[i], dot = 0;
#pragma omp simd reduction(+ : dot)
                for (size c = i * d; c < (i + 1) * d; c++) {
                    dot += grad[c] * heads[c];
                    line[c] = grad[c] * inverse;
                }
                line[nd + i] = -dot * inverse;
            }
        }
        put_lines(lines, count, columns, t, p->T, row->heads);
    }
}

/* Gradients of the keys from `first` on; adds to those of all queries, d_q (T, deep). */
static void backward_block(
    const problem *p, const results *found, const backward_row *row, size b, size first, float *scratch, float *d_q,
    const gradients *out
) {
    size T = p->T, S = p->S, n = p->n, d = p->d, nd = n * d, columns = columns_of(p);
    size deep = rounded(d, NR), width = rounded(n, LANES), count = least(KEYS, S - first), padded = rounded(count, NR);
    float *e = scratch, *d_s = e + ROWS * KEYS, *d_w = d_s + ROWS * KEYS; /* (ROWS, KEYS) twice; (KEYS, columns) */
    float *d_k = d_w + KEYS * columns;                                  /* (KEYS, deep) */
    memset(d_w, 0, 4 * KEYS * (columns + deep));
    for (size begin = p->is_causal ? first : 0; begin < T; begin += ROWS) {
        size end = least(begin + ROWS, T);
        /* a query sees keys before it; of those of a micro-kernel's columns, none or some */
#define IN_VIEW(s, t) (!p->is_causal || first + (s) < (t))
        for (size t = begin; t < end; t += MR) {
            size rows = least(MR, end - t);
            for (size s = 0; s < count; s += NR)
                if (IN_VIEW(s, t + rows))
                    by_rows(
                        rows, d, of_token(&p->q, b, t), p->q.token, row->keys + (first + s) * d,
                        e + (t - begin) * KEYS + s, KEYS, 0
                    );
                else
                    for (size r = 0; r < rows; r++) {
                        memset(e + (t + r - begin) * KEYS + s, 0, 4 * NR);
                        memset(d_s + (t + r - begin) * KEYS + s, 0, 4 * NR);
                    }
            for (size r = t; r < t + rows; r++) {
                float level = *of_token(&found->sums, b, r) == 0 ? INFINITY : *of_token(&found->level, b, r);
                float *x = e + (r - begin) * KEYS;
                hide(p, b, r, first, first + padded, x);
                for (size s = 0; s < padded; s += LANES) store(x + s, exponential(load(x + s) - level));
            }
        }
        for (size j = 0; j < columns; j += PANELS * NR)
            for (size s = 0; s < count; s += NR)
                for (size t = begin; t < end; t += MR) {
                    size rows = least(MR, end - t);
                    if (IN_VIEW(s, t + rows))
                        by_panels(
                            rows, least(PANELS, (columns - j) / NR), row->heads + j / NR * apart(T) + t * NR, apart(T),
                            row->weighed + (first + s) * columns + j * NR, d_s + (t - begin) * KEYS + s, KEYS, j > 0
                        );
                }
        for (size t = 0; t < end - begin; t++)
            for (size x = t * KEYS; x < t * KEYS + padded; x += LANES) store(d_s + x, load(d_s + x) * load(e + x));
        for (size j = 0; j < columns; j += NR)
            for (size s = 0; s < count; s += MR) {
                size from = p->is_causal && first + s > begin ? first + s : begin;
                if (from < end)
                    by_columns(
                        least(MR, count - s), end - from, e + (from - begin) * KEYS + s, KEYS,
                        row->heads + j / NR * apart(T) + from * NR, d_w + s * columns + j, columns, 1
                    );
            }
        for (size j = 0; j < deep; j += NR) {
            for (size s = 0; s < count; s += MR) {
                size from = p->is_causal && first + s > begin ? first + s : begin;
                if (from < end)
                    by_columns(
                        least(MR, count - s), end - from, d_s + (from - begin) * KEYS + s, KEYS,
                        row->query_columns + j / NR * apart(T) + from * NR, d_k + s * deep + j, deep, 1
                    );
            }
            for (size t = begin; t < end; t += MR) {
                size rows = least(MR, end - t), depth = least(count, seen(p, t + rows - 1) - first);
                if (depth > 0)
                    by_rows(
                        rows, depth, d_s + (t - begin) * KEYS, KEYS, row->key_columns + j / NR * apart(S) + first * NR,
                        d_q + t * deep + j, deep, 1
                    );
            }
        }
#undef IN_VIEW
    }
    for (size s = 0; s < count; s++) {
        const float *v = of_token(&p->v, b, first + s), *w = row->w + (first + s) * width, *x = d_w + s * columns;
        float *d_v = of_token(&out->v, b, first + s), *d_r = of_token(&out->r, b, first + s);
        memset(d_v, 0, 4 * d);
        for (size i = 0; i < n; i++) {
            float dot = x[nd + i], weight = w[i];
#pragma omp simd reduction(+ : dot)
            for (size c = 0; c < d; c++) {
                d_v[c] += weight * x[i * d + c];
                dot += v[c] * x[i * d + c];
            }
            d_r[i] = weight * dot;
        }
        memcpy(of_token(&out->k, b, first + s), d_k + s * deep, 4 * d);
    }
}

/* Writes gradients from what the forward pass has found; those of k are without what r depends on them. Queries whose
 * sums are 0 are left out. Returns 0, or -1 if there is no memory. */
int shared_score_backward(const problem *p, const results *found, const matrix *grad, const gradients *out) {
    size S = p->S, T = p->T, d = p->d, columns = columns_of(p), padded = rounded(S, NR);
    size width = rounded(p->n, LANES), deep = rounded(d, NR);
    size blocks = (S + KEYS - 1) / KEYS, tiles = (T + ROWS - 1) / ROWS, parts = least(blocks, PARTS);
    size of_row = padded * (d + columns) + rounded(S * width, NR) + deep / NR * apart(S) + (deep + columns) / NR * apart(T);
    size of_block = 2 * ROWS * KEYS + KEYS * (columns + deep), of_thread = rounded(of_block > NR * d ? of_block : NR * d, NR);
    space *memory = take(p->B * of_row + p->threads * of_thread + p->B * parts * T * deep);
    int state = memory ? 0 : -1;
    if (memory) {
        float *packed = memory->numbers, *own = packed + p->B * of_row, *partial = own + p->threads * of_thread;
#pragma omp parallel num_threads(p->threads)
        {
            float *mine = own + omp_get_thread_num() * of_thread;
            memset(mine, 0, 4 * LINES * columns); /* ends of lines stay zero */
#pragma omp for schedule(static) nowait
            for (size unit = 0; unit < p->B * tiles; unit++) {
                size b = unit / tiles, begin = unit % tiles * ROWS;
                backward_row row = backward_row_at(p, packed + b * of_row);
                pack_backward_queries(p, found, grad, &row, b, begin, least(begin + ROWS, T), mine);
            }
#pragma omp for schedule(static)
            for (size unit = 0; unit < p->B * blocks; unit++) {
                size b = unit / blocks, begin = unit % blocks * KEYS;
                backward_row row = backward_row_at(p, packed + b * of_row);
                pack_backward_keys(p, &row, b, begin, least(begin + KEYS, S), mine);
            }
#pragma omp for schedule(dynamic, 1)
            for (size unit = 0; unit < p->B * parts; unit++) {
                size b = unit % p->B, part = unit / p->B;
                backward_row row = backward_row_at(p, packed + b * of_row);
                float *d_q = partial + (b * parts + part) * T * deep;
                memset(d_q, 0, 4 * T * deep);
                for (size block = part; block < blocks; block += parts)
                    backward_block(p, found, &row, b, block * KEYS, mine, d_q, out);
            }
#pragma omp for schedule(static)
            for (size unit = 0; unit < p->B * T; unit++) {
                size b = unit / T, t = unit % T;
                const float *d_q = partial + (b * parts * T + t) * deep;
                float *sum = of_token(&out->q, b, t);
                memcpy(sum, d_q, 4 * d);
                for (size part = 1; part < parts; part++)
                    for (size c = 0; c < d; c++) sum[c] += d_q[part * T * deep + c];
            }
        }
    }
    give_back(memory);
    return state;
}
