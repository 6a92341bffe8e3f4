package config

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Notify is a place that is told of what happens to tags. It goes where the
// configuration says, private networks included, and follows no redirects.
type Notify struct {
	// Name is what logs, metrics and the outbox call it: what was not delivered
	// waits under this name.
	Name string `yaml:"name"`
	// Type is webhook, slack, teams, discord, ntfy, file, stdout or exec.
	Type string `yaml:"type"`
	// URL is the address that is posted to. What of it may be secret is not shown.
	URL Webhook `yaml:"url"`
	// SecretFile holds the keys that sign a webhook, one a line (Standard Webhooks:
	// whsec_ for HMAC, whsk_ for ed25519), or the access token of ntfy.
	SecretFile string `yaml:"secret_file"`
	Secret     Secret `yaml:"-"` // read from SecretFile
	// Format of a webhook is cloudevents, or plain: title and text, for people.
	Format string `yaml:"format"`
	// Path is the file that events are added to, one a line.
	Path string `yaml:"path"`
	// Command is the program that is called, and its arguments; no shell is involved.
	Command []string `yaml:"command"`
	// Match is a pattern of references. Default: all.
	Match string `yaml:"match"`
	// Events are the types to tell of. Default: all that are alerts.
	Events []string `yaml:"events"`
	// MinSeverity of what is told as it comes: info, notice, warning, high or critical.
	// Default: warning.
	MinSeverity string `yaml:"min_severity"`
	// GroupBy is repository, so that what comes within group_wait is one message, or
	// none. Default: repository.
	GroupBy string `yaml:"group_by"`
	// GroupWait is how long it waits for more; what is critical never does. A move
	// waits for audit.flap_window, too. Default: 2m.
	GroupWait *Duration `yaml:"group_wait"`
	// Digest is when what is below min_severity is told, such as daily@08:00.
	// Default: never.
	Digest string `yaml:"digest"`
}

// The types of Notify.
const (
	NotifyWebhook = "webhook"
	NotifySlack   = "slack"
	NotifyTeams   = "teams"
	NotifyDiscord = "discord"
	NotifyNtfy    = "ntfy"
	NotifyFile    = "file"
	NotifyStdout  = "stdout"
	NotifyExec    = "exec"
)

var notifyTypes = []string{NotifyWebhook, NotifySlack, NotifyTeams, NotifyDiscord, NotifyNtfy, NotifyFile, NotifyStdout, NotifyExec}

// The values of GroupBy.
const (
	GroupRepository = "repository"
	GroupNone       = "none"
)

var sinkName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,63}$`)

func (c *Config) validateNotify(d *decoder) {
	seen := make(map[string]int)
	for i := range c.Notify {
		n := &c.Notify[i]
		path := fmt.Sprintf("notify[%d]", i)
		n.validate(d, path)
		if before, twice := seen[n.Name]; twice && n.Name != "" {
			d.fail(path+".name", nil, "%q is the name of notify[%d] already", n.Name, before)
		}
		seen[n.Name] = i
	}
}

// validate checks what package config can know: types, patterns and severities are
// the ledger's.
func (n *Notify) validate(d *decoder, path string) {
	if !sinkName.MatchString(n.Name) {
		d.fail(path+".name", nil, "%q is not a name such as ops: a-z, 0-9, - and _", n.Name)
	}
	if !slices.Contains(notifyTypes, n.Type) {
		d.fail(path+".type", nil, "%q is not one of %s", n.Type, strings.Join(notifyTypes, ", "))
		return
	}
	posts := n.Type != NotifyFile && n.Type != NotifyStdout && n.Type != NotifyExec
	for _, k := range []struct {
		key         string
		given, fits bool
		needed      bool
	}{
		{"url", n.URL != "", posts, posts},
		{"secret_file", n.SecretFile != "", n.Type == NotifyWebhook || n.Type == NotifyNtfy, false},
		{"format", n.Format != "", n.Type == NotifyWebhook, false},
		{"path", n.Path != "", n.Type == NotifyFile, n.Type == NotifyFile},
		{"command", len(n.Command) > 0, n.Type == NotifyExec, n.Type == NotifyExec},
	} {
		switch {
		case k.given && !k.fits:
			d.failQuietly(path+"."+k.key, fmt.Sprintf("type %s has no use for it", n.Type))
		case !k.given && k.needed:
			d.fail(path+"."+k.key, nil, "type %s needs it", n.Type)
		}
	}
	if u, err := url.Parse(string(n.URL)); n.URL != "" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		d.failQuietly(path+".url", "want an address such as https://hooks.example/tidemark")
	}
	if n.Format != "" && n.Format != "cloudevents" && n.Format != "plain" {
		d.fail(path+".format", nil, "%q is neither cloudevents nor plain", n.Format)
	}
	if n.GroupBy != "" && n.GroupBy != GroupRepository && n.GroupBy != GroupNone {
		d.fail(path+".group_by", nil, "%q is neither %s nor %s", n.GroupBy, GroupRepository, GroupNone)
	}
	if n.SecretFile != "" {
		var err error
		if n.Secret, err = readSecret(n.SecretFile); err != nil {
			d.fail(path+".secret_file", nil, "%v", err)
		}
	}
}
