//! How a connection ended, in two letters, as HAProxy's termination state: who or what ended it, and
//! in which phase.
//!
//! Invariant: every connection that was accepted ends in exactly one of these states, and no state
//! means two things that an operator would treat differently.
//!
//! Deliberately not here: deciding which state it is (see `connection.rs`), and logging it (see
//! `connection/ended.rs`).

use std::fmt;

/// How a connection ended.
///
/// The first letter says who ended it: `C` client, `S` mailbox (server), lower case for a time-out of that side,
/// `A` the tailnet's access rules, `P` a limit of this proxy, `T` the tailnet (this edge was not on it), `D` the
/// mailbox's node was found dead, `K` the edge stops (killed), `I` an error inside the edge. The second letter
/// says when: `C` connecting, `Q` held (queued), `H` before the mailbox's first byte, `R` the same, but for this
/// client only (refused), `D` data, `L` after one side's end (last), `-` in order. As with HAProxy, `C` and `D`
/// have one meaning as first letter and another as second; no other letter is used in both places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EndState {
    /// Orderly; the client closed first.
    ClientClosed,
    /// Orderly; the mailbox closed first.
    ServerClosed,
    /// The client left while the mailbox was dialled.
    ClientLeftConnecting,
    /// The client left while it was held.
    ClientLeftHeld,
    /// The client left before the mailbox had sent anything.
    ClientLeftUngreeted,
    /// The client's connection failed.
    ClientFailed,
    /// The mailbox had closed its side, and then the client made no progress.
    ClientStalled,
    /// Neither side sent anything for the idle time-out.
    Idle,
    /// The mailbox cannot be reached.
    ServerUnreachable,
    /// The mailbox does not answer.
    ServerSilent,
    /// The tailnet's policy denies the mailbox's port.
    PolicyDenied,
    /// No mailbox served the client within the hold time.
    HoldEnded,
    /// The mailbox closed before it sent anything.
    ServerWordless,
    /// The same, although it had lately greeted others: it has banned this client, or does not like what the
    /// client sent.
    ServerRefused,
    /// The mailbox's connection failed.
    ServerFailed,
    /// The client had closed its side, and then the mailbox made no progress.
    ServerStalled,
    /// The mailbox's node vanished.
    ServerVanished,
    /// This edge is not on the tailnet.
    NoTailnet,
    /// The client has as many connections as one client may have.
    ClientLimit,
    /// `hold_max` clients are held already.
    HoldFull,
    /// The edge stops, and the connection was idle, waiting for its client.
    StoppedQuiet,
    /// The edge stops, and the client was waiting for the mailbox.
    StoppedWaiting,
    /// The edge stops, and the drain time-out has passed.
    StoppedCut,
    /// An error inside the edge.
    Internal,
}

impl EndState {
    /// Every state, in the order the documentation lists them.
    pub const ALL: [EndState; 24] = [
        EndState::ClientClosed,
        EndState::ServerClosed,
        EndState::ClientLeftConnecting,
        EndState::ClientLeftHeld,
        EndState::ClientLeftUngreeted,
        EndState::ClientFailed,
        EndState::ClientStalled,
        EndState::Idle,
        EndState::ServerUnreachable,
        EndState::ServerSilent,
        EndState::PolicyDenied,
        EndState::HoldEnded,
        EndState::ServerWordless,
        EndState::ServerRefused,
        EndState::ServerFailed,
        EndState::ServerStalled,
        EndState::ServerVanished,
        EndState::NoTailnet,
        EndState::ClientLimit,
        EndState::HoldFull,
        EndState::StoppedQuiet,
        EndState::StoppedWaiting,
        EndState::StoppedCut,
        EndState::Internal,
    ];

    /// The two letters.
    pub const fn code(self) -> &'static str {
        self.entry().0
    }

    /// What it means, for people.
    pub const fn meaning(self) -> &'static str {
        self.entry().1
    }

    /// The `reason` label of `refused_connections`; `None` for a client that was not refused.
    pub const fn refusal(self) -> Option<&'static str> {
        match self {
            EndState::ServerUnreachable | EndState::ServerSilent => Some("unreachable"),
            EndState::PolicyDenied => Some("denied"),
            EndState::HoldEnded => Some("hold_ended"),
            EndState::HoldFull => Some("hold_full"),
            EndState::ClientLimit => Some("client_limit"),
            EndState::NoTailnet => Some("no_tailnet"),
            EndState::StoppedWaiting => Some("stopping"),
            _ => None,
        }
    }

    /// Whether our side or the mailbox is to blame, so that the operator may want to know.
    pub const fn is_failure(self) -> bool {
        matches!(
            self,
            EndState::ServerUnreachable
                | EndState::ServerSilent
                | EndState::PolicyDenied
                | EndState::HoldEnded
                | EndState::ServerWordless
                | EndState::ServerFailed
                | EndState::ServerStalled
                | EndState::ServerVanished
                | EndState::NoTailnet
                | EndState::HoldFull
                | EndState::StoppedCut
                | EndState::Internal
        )
    }

    const fn entry(self) -> (&'static str, &'static str) {
        match self {
            EndState::ClientClosed => ("C-", "the client closed first, and both sides ended in order"),
            EndState::ServerClosed => ("S-", "the mailbox closed first, and both sides ended in order"),
            EndState::ClientLeftConnecting => ("CC", "the client left while the mailbox was being dialled"),
            EndState::ClientLeftHeld => ("CQ", "the client left while it was held"),
            EndState::ClientLeftUngreeted => ("CH", "the client left before the mailbox had sent anything"),
            EndState::ClientFailed => ("CD", "the client's connection failed, most often by a reset"),
            EndState::ClientStalled => (
                "cL",
                "the mailbox had ended its side, and the client made no progress for timeouts.half_close",
            ),
            EndState::Idle => ("cD", "neither side sent anything for the listener's idle_timeout"),
            EndState::ServerUnreachable => ("SC", "the mailbox could not be reached; the client was refused"),
            EndState::ServerSilent => {
                ("sC", "the mailbox did not answer within timeouts.connect; the client was refused")
            }
            EndState::PolicyDenied => (
                "AC",
                "the tailnet's policy denies this edge the mailbox's port; the client was held for the listener's hold time, then refused",
            ),
            EndState::HoldEnded => (
                "sQ",
                "the client was held for the whole hold time, and no mailbox served it; the client was refused",
            ),
            EndState::ServerWordless => ("SH", "the mailbox closed the connection before it sent anything"),
            EndState::ServerRefused => (
                "SR",
                "the mailbox closed this client's connection before it sent anything, although it had greeted another client in the ten minutes before",
            ),
            EndState::ServerFailed => ("SD", "the mailbox's connection failed, most often by a reset"),
            EndState::ServerStalled => (
                "sL",
                "the client had ended its side, and the mailbox made no progress for timeouts.half_close",
            ),
            EndState::ServerVanished => (
                "DD",
                "the mailbox's node did not answer for timeouts.dead_peer, so the connection was reset",
            ),
            EndState::NoTailnet => ("TC", "this edge was not on the tailnet; the client was refused"),
            EndState::ClientLimit => {
                ("PC", "the client had as many connections as limits.max_connections_per_client allows")
            }
            EndState::HoldFull => {
                ("PQ", "as many clients were held as limits.hold_max allows; the client was refused")
            }
            EndState::StoppedQuiet => {
                ("K-", "the edge was stopping, and the connection was idle, waiting for its client")
            }
            EndState::StoppedWaiting => (
                "KQ",
                "the edge was stopping while the client waited for the mailbox; the client was refused",
            ),
            EndState::StoppedCut => {
                ("KD", "the edge was stopping, and the connection was cut when timeouts.drain was over")
            }
            EndState::Internal => ("I-", "an error inside the edge; please report it with the lines before"),
        }
    }
}

impl fmt::Display for EndState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.code())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_two_letters_and_differ() {
        let codes: BTreeSet<&str> = EndState::ALL.iter().map(|state| state.code()).collect();
        assert_eq!(codes.len(), EndState::ALL.len());
        assert!(codes.iter().all(|code| code.len() == 2), "{codes:?}");
        let states: BTreeSet<EndState> = EndState::ALL.into();
        assert_eq!(states.len(), EndState::ALL.len(), "one is named twice, so another is missing");
    }

    #[test]
    fn a_letter_is_used_in_one_place_only_but_for_two_of_haproxy() {
        let letters = |place: usize| -> BTreeSet<char> {
            EndState::ALL.iter().filter_map(|state| state.code().chars().nth(place)).collect()
        };
        let both: String = letters(0).intersection(&letters(1)).collect();
        assert_eq!(both, "CD");
    }

    #[test]
    fn who_failed_the_client_shows_in_the_first_letter() {
        for state in EndState::ALL {
            let ours = !state.code().starts_with(['C', 'c']) && state != EndState::ClientLimit;
            let in_order = state.code().ends_with('-') && state != EndState::Internal;
            let meant = matches!(state, EndState::StoppedWaiting | EndState::ServerRefused);
            assert_eq!(state.is_failure(), ours && !in_order && !meant, "{state}");
        }
    }
}
