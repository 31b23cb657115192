use super::*;

/// The verdict on the whole, which must not depend on how it comes in pieces.
fn verdict(protocol: Protocol, said: &[u8]) -> Verdict {
    let whole = HeaderWatch::new(protocol).unwrap().server_said(said);
    for size in [1, 2, 7, 31, 33] {
        let mut watch = HeaderWatch::new(protocol).unwrap();
        let mut pieces = said.chunks(size).map(|piece| watch.server_said(piece));
        let verdict = pieces.find(|&v| v != Verdict::Undecided).unwrap_or(Verdict::Undecided);
        assert_eq!(verdict, whole, "{} in pieces of {size}", said.escape_ascii());
    }
    whole
}

#[track_caller]
fn check(protocol: Protocol, expected: Verdict, cases: &[&str]) {
    for said in cases {
        assert_eq!(verdict(protocol, said.as_bytes()), expected, "{said:?}");
    }
}

#[test]
fn only_a_server_that_speaks_first_is_watched() {
    let watched = Protocol::ALL.into_iter().filter(|&protocol| HeaderWatch::new(protocol).is_some());
    let names: Vec<&str> = watched.map(Protocol::name).collect();
    assert_eq!(names, ["smtp", "submission", "imap", "pop3", "sieve"]);
}

#[test]
fn an_smtp_server_that_took_the_header_for_commands() {
    check(
        Protocol::Smtp,
        Verdict::Taken,
        &[
            // Stalwart 0.15.5.
            "220 mail.example.test Stalwart ESMTP at your service\r\n500 5.5.1 Invalid command.\r\n\
             500 5.5.1 Invalid command.\r\n500 5.5.1 Invalid command.\r\n221 2.0.0 Bye.\r\n",
            // Postfix 3.7, v2 and v1.
            "220 mail.example.test ESMTP Postfix\r\n500 5.5.2 Error: bad syntax\r\n",
            "220 mail.example.test ESMTP Postfix\r\n502 5.5.2 Error: command not recognized\r\n",
            "220 mail.example.test ESMTP\r\n221 2.7.0 Error: I can break rules, too. Goodbye.\r\n",
            // Later ones that are strict about line ends.
            "220 mail.example.test ESMTP\r\n521 5.5.2 mail.example.test Error: bare <LF> received\r\n",
            "220 mail.example.test ESMTP\r\n554 5.5.0 Error: SMTP protocol synchronization\r\n",
            // postscreen, after its teaser.
            "220-mail.example.test ESMTP\r\n521 5.5.1 Protocol error\r\n",
            // Exim.
            "554 SMTP synchronization error\r\n",
            "220 old.example.test\n500 unrecognized command\n",
        ],
    );
}

#[test]
fn an_smtp_server_that_is_well_raises_no_alarm() {
    check(
        Protocol::Smtp,
        Verdict::Undecided,
        &[
            "",
            "220 mail.example.test ESMTP\r\n",
            "220 mail.example.test ESMTP\r\n500 5.5.1 not ended",
            "220-mail.example.test ESMTP\r\n",
            "220-mail.example.test ESMTP\r\n220 mail.example.test ESMTP Postfix\r\n",
            "220-mail.example.test\r\n220-500 5.5.1 is what we say to spammers\r\n220\r\n",
        ],
    );
}

#[test]
fn a_refusal_for_another_reason_is_no_alarm() {
    check(
        Protocol::Smtp,
        Verdict::Fine,
        &[
            "421 4.3.2 Too many connections\r\n",
            "554 mail.example.test ESMTP not accepting messages\r\n",
            "554 5.7.1 Service unavailable; client [192.0.2.7] blocked using zen.spamhaus.org\r\n",
            "220 mail.example.test\r\n421 4.4.2 mail.example.test Error: timeout exceeded\r\n",
            // postscreen and a ban list.
            "220-mail.example.test ESMTP\r\n521 5.7.1 Service unavailable; client [192.0.2.7] blocked\r\n",
            "SSH-2.0-OpenSSH_9.2\r\n",
        ],
    );
}

#[test]
fn imap() {
    check(
        Protocol::Imap,
        Verdict::Taken,
        &[
            "* OK [CAPABILITY IMAP4rev1] Dovecot ready.\r\n* BAD Error in IMAP command received by server.\r\n",
            "* OK ready\r\n\0 BAD Error in IMAP command received by server.\r\n",
            "* OK ready\r\nPROXY BAD Error in IMAP command TCP4: Unknown command.\r\n",
            "* OK Stalwart IMAP4rev2 at your service.\r\nQUIT bad Invalid command.\r\n",
        ],
    );
    check(
        Protocol::Imap,
        Verdict::Undecided,
        &[
            "* OK [CAPABILITY IMAP4rev1 SASL-IR LOGIN-REFERRALS ID ENABLE IDLE LITERAL+] Dovecot ready.\r\n",
            "* PREAUTH welcome\r\n* CAPABILITY IMAP4rev1 BAD\r\n",
            "* ok ready\r\n* OK still here\r\n",
        ],
    );
    check(
        Protocol::Imap,
        Verdict::Fine,
        &["* BYE [UNAVAILABLE] later\r\n", "* OK ready\r\n* BYE Disconnected for inactivity.\r\n"],
    );
}

#[test]
fn pop3() {
    check(
        Protocol::Pop3,
        Verdict::Taken,
        &["+OK ready\r\n-ERR Unknown command.\r\n", "+OK ready\r\n+OK Logging out\r\n"],
    );
    check(Protocol::Pop3, Verdict::Undecided, &["+OK Dovecot ready. <1.2.3@mail.example.test>\r\n"]);
    check(
        Protocol::Pop3,
        Verdict::Fine,
        &["-ERR no mailbox for you\r\n", "+OK ready\r\n-ERR [SYS/TEMP] shutting down\r\n"],
    );
}

#[test]
fn sieve() {
    let capabilities = "\"IMPLEMENTATION\" \"Dovecot Pigeonhole\"\r\n\"SIEVE\" \"fileinto NO BYE\"\r\n\"STARTTLS\"\r\nOK \"ready\"\r\n";
    check(
        Protocol::Sieve,
        Verdict::Taken,
        &[&format!("{capabilities}NO \"Error in MANAGESIEVE command received by server.\"\r\n")],
    );
    check(Protocol::Sieve, Verdict::Undecided, &[capabilities]);
    check(
        Protocol::Sieve,
        Verdict::Fine,
        &["BYE (TRYLATER) \"full\"\r\n", &format!("{capabilities}BYE \"idle\"\r\n")],
    );
}

#[tokio::test(start_paused = true)]
async fn an_error_long_after_the_greeting_is_about_something_else() {
    let mut watch = HeaderWatch::new(Protocol::Pop3).unwrap();
    assert_eq!(watch.server_said(b"+OK ready\r\n"), Verdict::Undecided);
    tokio::time::advance(Duration::from_secs(180)).await;
    assert_eq!(watch.server_said(b"-ERR Disconnected for inactivity.\r\n"), Verdict::Fine);
}

#[test]
fn an_endless_greeting_is_given_up() {
    let mut watch = HeaderWatch::new(Protocol::Smtp).unwrap();
    let mut asked = 0;
    while watch.server_said(b"220-and so on\r\n") == Verdict::Undecided {
        asked += 1;
        assert!(asked < WATCHED);
    }
    assert_eq!(HeaderWatch::new(Protocol::Smtp).unwrap().server_said(&[b'x'; 100_000]), Verdict::Fine);
}

#[test]
fn a_watch_is_small() {
    assert!(size_of::<HeaderWatch>() <= 64, "{} bytes", size_of::<HeaderWatch>());
}
