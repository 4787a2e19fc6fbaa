/* Checks for the C tests of the C interface: a failed one is told and counted, and the test goes
 * on. */
#ifndef FATHOM_TESTS_CAPI_SUPPORT_H
#define FATHOM_TESTS_CAPI_SUPPORT_H

#include <stdio.h>
#include <string.h>

#include "capi/fathom.h"
#include "capi_fixture.h"

static int failures = 0;

#define EXPECT(condition)                                                               \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      ++failures;                                                                       \
      fprintf(stderr, "%s:%d: %s: not %s\n", __FILE__, __LINE__, __func__, #condition); \
    }                                                                                   \
  } while (0)

/* The call returns this code and fills *err accordingly. */
#define EXPECT_CODE(expected, call)                                                             \
  do {                                                                                          \
    const int32_t expected_code = (expected);                                                   \
    int32_t returned_code;                                                                      \
    memset(err, 0x5a, sizeof *err);                                                             \
    err->struct_size = (uint32_t)sizeof *err;                                                   \
    returned_code = (call);                                                                     \
    if (returned_code != expected_code) {                                                       \
      ++failures;                                                                               \
      fprintf(stderr, "%s:%d: %s: %s is %s, not %s: %s\n", __FILE__, __LINE__, __func__, #call, \
              fathom_status_name(returned_code), fathom_status_name(expected_code),             \
              returned_code < 0 ? err->message : "");                                           \
    }                                                                                           \
    if (returned_code < 0) {                                                                    \
      EXPECT(err->code == returned_code);                                                       \
      EXPECT(err->message[0] != 'Z' && strlen(err->message) < sizeof err->message);             \
    } else {                                                                                    \
      EXPECT(err->code == 0x5a5a5a5a);                                                          \
    }                                                                                           \
  } while (0)

#define EXPECT_OK(call) EXPECT_CODE(FATHOM_OK, call)

#endif
