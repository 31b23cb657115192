// What the parts of this program share.
#ifndef CHECK_H
#define CHECK_H

#include "tailscale.h"

// Ends the program, naming the call as it is written, unless it gives `wanted`.
#define EXPECT(call, wanted) expect(#call, (long long)(call), (wanted), __FILE__, __LINE__)
#define TRUE(condition) EXPECT(!!(condition), 1)
// The same for every element of an array; `i` counts.
#define EACH(array, call, wanted) \
    for (size_t i = 0; i < sizeof(array) / sizeof *(array); i++) EXPECT(call, wanted)

void expect(const char* call, long long got, long long wanted, const char* file, int line);

// A node that is not enrolled; without a key if that is NULL.
tailscale fresh_node(const char* control_url, const char* key);
// Upstream's contract for tailscale_getips and tailscale_errmsg, given a node
// of which `get` has something to tell.
void expect_text(tailscale sd, int (*get)(tailscale, char*, size_t));
// Handles that name no connection, beside this one.
void expect_no_connection(tailscale_conn closed);
void expect_no_listener(tailscale_listener closed);

void arguments(void);
// Runs this program again, with a credential in every variable, unless `again`.
void environment(const char* again);
void joining(void);
// The token of every connection and listener here is a semaphore.
void wake(uintptr_t token, uint32_t ready);
// A port that a node listens on, and another node that connects to it.
void listening(const char* control_url);
void connection(const char* control_url, const char* peer, uint16_t port);

#endif
