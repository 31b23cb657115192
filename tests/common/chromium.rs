//! A real browser without a screen (Debian's package `chromium`): what a page looks like, what is in it
//! once it is loaded, what the browser complains of and what else the page makes it ask for.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::temp_dir;
use super::tools::run;

const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// How to look.
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub width: u32,
    pub height: u32,
    pub dark: bool,
    pub script: bool,
}

/// What was seen.
#[derive(Debug)]
pub struct Seen {
    /// The document after loading.
    pub dom: String,
    /// What the page made the browser complain of.
    pub console: Vec<String>,
    /// Every address that the page itself has asked for.
    pub requests: Vec<String>,
}

/// Loads a page; a picture of it is left there.
#[track_caller]
pub fn look(url: &str, view: View, picture: &Path) -> Seen {
    let (_, mut console, mut requests) = load(url, view, &format!("--screenshot={}", picture.display()));
    let (dom, complaints, more) = load(url, view, "--dump-dom");
    console.extend(complaints);
    requests.extend(more);
    Seen { dom, console, requests }
}

/// What is told on standard output, the complaints and the page's requests.
#[track_caller]
fn load(url: &str, view: View, purpose: &str) -> (String, Vec<String>, Vec<String>) {
    let dir = temp_dir("chromium");
    let net_log = dir.path().join("net.json");
    let scheme = if view.dark { 0 } else { 1 };
    let profile = dir.path().join("profile");
    // 1 allows script, 2 forbids it. What the browser does for us is script too, so it is not turned off.
    let may_run = if view.script { 1 } else { 2 };
    let settings =
        format!("{{\"profile\":{{\"default_content_setting_values\":{{\"javascript\":{may_run}}}}}}}");
    fs::create_dir_all(profile.join("Default")).expect("a directory of our own takes files");
    fs::write(profile.join("Default/Preferences"), settings).expect("a directory of our own takes files");
    let mut command = Command::new("chromium");
    command
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("--log-net-log={}", net_log.display()))
        .arg(format!("--window-size={},{}", view.width, view.height))
        .arg(format!("--blink-settings=preferredColorScheme={scheme}"))
        .args([purpose, url])
        .env("HOME", dir.path());
    let told = run(&mut command, b"", LOAD_LIMIT).expect_success();
    let is_complaint = |line: &&str| line.contains("CONSOLE");
    let console = told.stderr.lines().filter(is_complaint).map(str::to_owned).collect();
    let log = fs::read(&net_log).expect("the browser has written it");
    let log: Value = serde_json::from_slice(&log).expect("the browser has ended it");
    (told.stdout(), console, requests(&log, url))
}

/// The addresses that were asked for on behalf of a page, itself included; what a browser asks for by
/// itself is no business of the page.
fn requests(log: &Value, page: &str) -> Vec<String> {
    let params = log["events"].as_array().into_iter().flatten().map(|event| &event["params"]);
    let of_page = |params: &&Value| {
        let initiator = params["initiator"].as_str().unwrap_or_default();
        let is_its = !initiator.is_empty() && page.starts_with(initiator);
        params["url"].is_string() && (is_its || params["url"] == page)
    };
    params.filter(of_page).filter_map(|params| params["url"].as_str().map(str::to_owned)).collect()
}

/// What a page measures at a width, and whether its text can be read.
#[derive(Debug)]
pub struct Measured {
    /// How far it can be scrolled to the side, in pixels.
    pub overflow: i64,
    /// The least contrast of any text with what is behind it, as WCAG 2 has it, and where.
    pub least_contrast: f64,
    pub least_legible: String,
    /// How many pieces of text were looked at.
    pub texts: u64,
}

/// Lays a page out in a frame of this width, and leaves a picture there. The page's own policy allows
/// neither a frame nor our script, so this is done with a copy.
#[track_caller]
pub fn measure(html: &str, width: u32, height: u32, dark: bool, picture: &Path) -> Measured {
    let dir = temp_dir("page");
    let copy = html.replace("http-equiv=\"refresh\"", "name=\"was-refresh\"");
    let copy = copy.replace('&', "&amp;").replace('"', "&quot;");
    let frame = format!(
        "<!DOCTYPE html><meta name=color-scheme content=\"light dark\"><pre id=told hidden></pre>\
         <style>body{{margin:0}}iframe{{border:0;display:block;width:{width}px;height:{height}px}}</style>\
         <script>{MEASURE}</script><iframe srcdoc=\"{copy}\" onload=\"measure(contentDocument)\"></iframe>"
    );
    let file = dir.path().join("frame.html");
    fs::write(&file, frame).expect("a directory of our own takes files");
    let url = format!("file://{}", file.display());
    let view = View { width: width.max(500), height, dark, script: true };
    let seen = look(&url, view, picture);
    let told =
        seen.dom.split_once("<pre id=\"told\" hidden=\"\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let told: Value = told
        .and_then(|(told, _)| serde_json::from_str(told).ok())
        .unwrap_or_else(|| panic!("nothing was measured: {seen:?}"));
    Measured {
        overflow: told["overflow"].as_i64().expect("a number"),
        least_contrast: told["contrast"].as_f64().expect("a number"),
        least_legible: told["where"].to_string(),
        texts: told["texts"].as_u64().expect("a number"),
    }
}

/// <https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio>
const MEASURE: &str = r#"
function measure(page) {
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = (element) => page.defaultView.getComputedStyle(element);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = style(e).backgroundColor;
      const alpha = numbers(colour)[3];
      if (alpha === undefined || alpha === 1) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const told = { overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth, contrast: 99, where: '', texts: 0 };
  const texts = page.createTreeWalker(page.body, 4);
  while (texts.nextNode()) {
    const text = texts.currentNode;
    if (!text.data.trim()) continue;
    const [a, b] = [luminance(style(text.parentElement).color), luminance(behind(text.parentElement))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    told.texts += 1;
    if (contrast < told.contrast) { told.contrast = contrast; told.where = text.data; }
  }
  document.getElementById('told').textContent = JSON.stringify(told);
}
"#;
