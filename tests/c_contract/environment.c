// That nothing of a credential is left in the environment.
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

#define SECRET "s3cret-7f3a"

static char shown[1 << 16];

// What everybody who may look sees of this process's environment.
static const char* in_proc(void) {
    int file = open("/proc/self/environ", O_RDONLY);
    TRUE(file >= 0);
    size_t length = 0;
    ssize_t count;
    while ((count = read(file, shown + length, sizeof shown - 1 - length)) > 0) length += (size_t)count;
    TRUE(count == 0 && length < sizeof shown - 1);
    close(file);
    for (size_t i = 0; i < length; i++)
        if (shown[i] == '\0') shown[i] = '\n';
    shown[length] = '\0';
    return shown;
}

static const char* in_a_child(void) {
    FILE* child = popen("env", "r");
    TRUE(child != NULL);
    shown[fread(shown, 1, sizeof shown - 1, child)] = '\0';
    TRUE(pclose(child) == 0);
    return shown;
}

void environment(const char* again) {
    static char* const variables[] = {
        "PATH=/usr/bin:/bin",     "TS_AUTHKEY=" SECRET,  "TS_AUTH_KEY=" SECRET, "TS_CLIENT_SECRET=" SECRET,
        "TS_CLIENT_ID=" SECRET,   "TS_ID_TOKEN=" SECRET, "TS_AUDIENCE=" SECRET, "TS_CONTROL_URL=" SECRET,
        "TS_AUTHKEY=" SECRET "-twice", "TS_AUTHKEYS=not-theirs", NULL};
    if (!again) {
        char* const arguments[] = {"main", "environment", "again", NULL};
        execve("/proc/self/exe", arguments, variables);
        TRUE(!"execve");
    }
    TRUE(strstr(in_proc(), SECRET) && strstr(in_a_child(), SECRET));
    tailscale_forget_environment();
    for (char* const* variable = variables + 1; *variable; variable++) {
        char name[32] = "";
        strncat(name, *variable, strcspn(*variable, "="));
        TRUE(!getenv(name) == (strcmp(name, "TS_AUTHKEYS") != 0));
    }
    TRUE(!strstr(in_proc(), "s3cret"));
    TRUE(strstr(in_proc(), "TS_AUTHKEYS=not-theirs\n") && strstr(in_proc(), "PATH="));
    TRUE(!strstr(in_a_child(), "s3cret"));
    TRUE(strstr(in_a_child(), "TS_AUTHKEYS=not-theirs\n") && !strstr(in_a_child(), "TS_AUTHKEY="));
    tailscale_forget_environment();  // again is harmless
}
