#include "cpu/stream.h"

#include <stdint.h>
#include <string.h>

#if KASMINA_STREAMS
#include <emmintrin.h>

enum { LINE = 64 };

void kasmina_stream_copy(void *target, const void *source, size_t bytes)
{
    char *to = target;
    const char *from = source;
    size_t head = -(uintptr_t)to % LINE;
    if (head > bytes) head = bytes;
    memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    /* A whole line at a time: the processor sends it off as one. */
    for (; bytes >= LINE; to += LINE, from += LINE, bytes -= LINE) {
        const __m128i *s = (const __m128i *)from;
        __m128i *t = (__m128i *)to;
        const __m128i a = _mm_loadu_si128(s), b = _mm_loadu_si128(s + 1);
        const __m128i c = _mm_loadu_si128(s + 2), d = _mm_loadu_si128(s + 3);
        _mm_stream_si128(t, a), _mm_stream_si128(t + 1, b), _mm_stream_si128(t + 2, c), _mm_stream_si128(t + 3, d);
    }
    memcpy(to, from, bytes);
}

void kasmina_stream_end(void)
{
    _mm_sfence();
}

#else

void kasmina_stream_copy(void *target, const void *source, size_t bytes)
{
    memcpy(target, source, bytes);
}

void kasmina_stream_end(void)
{
}

#endif
