//! A certificate for the mail servers of a test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::tools::run;

/// The name in the certificate, and the name by which the servers greet.
pub const HOST_NAME: &str = "mail.example.test";

/// A self-signed certificate: clients trust it by taking the certificate itself as their authority.
pub struct Certificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Certificate {
    /// Writes `cert.pem` and `key.pem` into `dir`.
    pub fn create(dir: &Path) -> Certificate {
        Certificate::create_for(dir, HOST_NAME)
    }

    /// The same for another host name.
    pub fn create_for(dir: &Path, host_name: &str) -> Certificate {
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        let names = format!("subjectAltName=DNS:{host_name},DNS:localhost,IP:127.0.0.1,IP:::1");
        let mut openssl = Command::new("openssl");
        openssl
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
            .args(["-days", "30", "-subj", &format!("/CN={host_name}"), "-addext", &names])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&cert);
        run(&mut openssl, b"", Duration::from_secs(20)).expect_success();
        Certificate { cert, key }
    }

    /// The same, expired since yesterday.
    pub fn create_expired_for(dir: &Path, host_name: &str) -> Certificate {
        let good = Certificate::create_for(dir, host_name);
        let names = dir.join("names");
        std::fs::write(&names, format!("subjectAltName=DNS:{host_name}")).expect("the directory takes files");
        let mut openssl = Command::new("openssl");
        openssl.args(["x509", "-days", "-1", "-extfile"]).arg(names).arg("-in").arg(&good.cert);
        openssl.arg("-signkey").arg(&good.key).arg("-out").arg(&good.cert);
        run(&mut openssl, b"", Duration::from_secs(20)).expect_success();
        good
    }

    /// Writes certificate and key into one file, as HAProxy wants them, and says where.
    pub fn together(&self) -> PathBuf {
        let mut pem = std::fs::read(&self.cert).expect("it was written");
        pem.extend(std::fs::read(&self.key).expect("it was written"));
        let path = self.cert.with_file_name("both.pem");
        std::fs::write(&path, pem).expect("its directory takes files");
        path
    }
}
