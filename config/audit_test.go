package config_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tidemark/config"
)

// A policy that somebody wants tried out is read without this machine: no
// variable gets into it, and no file is looked at.
func TestPolicyOfOthersSeesNothingOfThisMachine(t *testing.T) {
	t.Setenv("CLOUD_KEY", "hunter2")
	text := `
upstreams: {docker.io: {username: a, password_file: /dev/zero, kind: mirror}}
admin: {token_file: /nowhere}
audit: {rules: [{match: "**", mode: "${CLOUD_KEY}"}]}
`
	var mode string
	c, err := config.ParseAudit([]byte(text), func(c *config.Config, _ func(path, message string)) { mode = c.Audit.Rules[0].Mode })
	if err != nil || mode != "${CLOUD_KEY}" || c.Upstreams["docker.io"].Kind != config.KindMirror {
		t.Errorf("mode %q, %v", mode, err)
	}
	if _, err := config.ParseAudit([]byte("audit: {gap_factor: 0}"), nil); err == nil {
		t.Error("what makes no sense was accepted")
	}
}

// A file of a secret is one of a sane size.
func TestSecretFilesAreBounded(t *testing.T) {
	large := filepath.Join(t.TempDir(), "large")
	if err := os.WriteFile(large, make([]byte, 70_000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{large, "/dev/zero", t.TempDir()} {
		_, err := config.Parse(fmt.Appendf(nil, "admin: {token_file: %q}", path), nil, nil)
		if err == nil || !strings.Contains(err.Error(), "admin.token_file") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// What of a webhook's address may be its secret is shown nowhere: not by check,
// not in an error, not in its excerpt.
func TestAddressesOfWebhooksAreNotShown(t *testing.T) {
	c := mustParse(t, `audit: {publish: [{type: webhook, url: "https://hooks.example/s3cret?key=s3cret"}]}`)
	if shown := c.String() + fmt.Sprintf("%v %+v %#v", c.Audit, c.Audit, c.Audit); strings.Contains(shown, "s3cret") || !strings.Contains(shown, "https://hooks.example/") {
		t.Errorf("shown as %s", shown)
	}
	for _, entry := range []string{
		`{type: webhok, url: "https://hooks.example/s3cret"}`, `{type: webhook, path: x, url: "https://hooks.example/s3cret"}`,
		`{type: webhook, url: "hooks.example/s3cret"}`, `{type: file, path: x, url: "https://hooks.example/s3cret"}`,
		`{type: webhook, url: "https://hooks.example/s3cret", secret_file: /nowhere}`,
	} {
		_, err := config.Parse([]byte("audit:\n  publish:\n    - "+entry+"\n"), nil, nil)
		if err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", entry, err)
		}
	}
	twice := `{type: webhook, url: "https://hooks.example/s3cret"}`
	if _, err := config.Parse([]byte("audit: {publish: ["+twice+", "+twice+"]}"), nil, nil); err == nil || !strings.Contains(err.Error(), "the same place") {
		t.Errorf("the same place twice: %v", err)
	}
}

// None of the digests, or none of the days, is no history.
func TestKeepOfEitherNoneIsNone(t *testing.T) {
	for _, text := range []string{"digests: 0", "days: 0", "digests: 0, days: 0"} {
		c, err := config.Parse([]byte("audit: {keep: {"+text+"}}"), nil, nil)
		if err != nil || c.Audit.Keep != (config.Keep{}) {
			t.Errorf("%s is %+v, %v", text, c, err)
		}
	}
}

// Numbers that would turn round when they become times are refused.
func TestNumbersThatBecomeTimes(t *testing.T) {
	for _, text := range []string{"keep: {digests: 5, days: 999999}", "gap_factor: 2147483647", "keep: {digests: -1, days: 5}", "gap_factor: x"} {
		if _, err := config.Parse([]byte("audit: {"+text+"}"), nil, nil); err == nil {
			t.Errorf("%s was accepted", text)
		}
	}
}
