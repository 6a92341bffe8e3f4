package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tidemark/proxy/upstream/upstreamtest"
)

// OpenSMTPD, rsyslog and Prometheus' Alertmanager, as Debian has them, are told of a
// move that is held, and that it is released.
func TestRealReceiversAreTold(t *testing.T) {
	smtpd, rsyslogd, alertmanager := need(t, "smtpd"), need(t, "rsyslogd"), need(t, "prometheus-alertmanager")
	if os.Getuid() != 0 {
		skip(t, "OpenSMTPD must be started by root")
	}
	dir, err := os.MkdirTemp("/tmp", "tidemark-receivers") // which the user that mail is delivered by can enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(addr, name string, args ...string) {
		t.Helper()
		cmd := exec.Command(name, args...)
		log := &lockedBuffer{}
		cmd.Stdout, cmd.Stderr, cmd.WaitDelay = log, log, 2*time.Second // its children may have them still
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Signal(syscall.SIGTERM)
			_ = cmd.Wait()
			if t.Failed() {
				t.Logf("%s:\n%s", name, log)
			}
		})
		until(t, func() bool {
			c, err := net.Dial("tcp", addr)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
	}
	port := func() (addr, number string) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, number, err = net.SplitHostPort(l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return l.Addr().String(), number
	}
	mail, lines := file("mail", "", 0o666), filepath.Join(dir, "log")
	mailAddr, mailPort := port()
	run(mailAddr, smtpd, "-d", "-f", file("smtpd.conf", fmt.Sprintf(`table everybody { "@" = "nobody" }
listen on 127.0.0.1 port %s
action "deliver" mda "cat >> %s" virtual <everybody>
match from any for any action "deliver"
`, mailPort, mail), 0o600))
	logAddr, logPort := port()
	run(logAddr, rsyslogd, "-n", "-i", filepath.Join(dir, "pid"), "-f", file("rsyslog.conf", fmt.Sprintf(`module(load="imptcp")
input(type="imptcp" address="127.0.0.1" port="%s")
template(name="parsed" type="string" string="%%app-name%% %%msgid%% %%syslogseverity-text%% %%msg%%\n")
action(type="omfile" file="%s" template="parsed")
`, logPort, lines), 0o600))
	amAddr, _ := port()
	run(amAddr, alertmanager, "--config.file", file("am.yml", "route: {receiver: none}\nreceivers: [{name: none}]\n", 0o600),
		"--storage.path", filepath.Join(dir, "am"), "--web.listen-address", amAddr, "--cluster.listen-address=")

	up := upstreamtest.New()
	defer up.Close()
	up.Push("library/app", "1", upstreamtest.NewImage("one"))
	s := serve(t, config(filepath.Join(t.TempDir(), "data"), up.URL().String(), "audit: {preset: strict}", fmt.Sprintf(`notify:
  - {name: mail, type: smtp, url: "smtp://%s", from: tidemark@example.org, to: [ops@example.org], min_severity: info, events: [tag.held, tag.released], group_wait: 0s}
  - {name: log, type: syslog, url: "tcp://%s", format: cef, min_severity: info, events: [tag.held, tag.released], group_wait: 0s}
  - {name: alerts, type: alertmanager, url: "http://%s", min_severity: info, events: [tag.held, tag.released], group_wait: 0s}`, mailAddr, logAddr, amAddr)))
	pull := func() {
		t.Helper()
		if resp, _, err := s.get("/v2/library/app/manifests/1"); err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
	}
	has := func(path, text string) func() bool {
		return func() bool { b, _ := os.ReadFile(path); return strings.Contains(string(b), text) }
	}
	firing := func() (n int) {
		resp, err := http.Get("http://" + amAddr + "/api/v2/alerts?active=true")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var alerts []struct{ Labels map[string]string }
		if err := json.NewDecoder(resp.Body).Decode(&alerts); err != nil {
			t.Fatal(err)
		}
		for _, a := range alerts {
			if a.Labels["alertname"] == "TidemarkHeld" && a.Labels["tag"] == "1" {
				n++
			}
		}
		return n
	}
	pull()
	next := upstreamtest.NewImage("two")
	up.Push("library/app", "1", next)
	pull()
	until(t, has(mail, "Subject: [warning] docker.io/library/app:1 moved, and is held"))
	until(t, has(lines, "tidemark tag.held warning CEF:0|tidemark|tidemark|"))
	until(t, func() bool { return firing() == 1 })
	if out, code := s.run("approve", "app:1", next.Manifest.Digest.String(), "--reason", "looked at it"); code != 0 {
		t.Fatal(out)
	}
	until(t, has(mail, "Subject: [info] docker.io/library/app:1 is released"))
	until(t, has(lines, "tidemark tag.released info CEF:0|"))
	until(t, func() bool { return firing() == 0 })
	s.stop()
}
