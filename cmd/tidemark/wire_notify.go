package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/audit/notify"
	"tidemark/audit/notify/alertmanager"
	"tidemark/audit/notify/discord"
	"tidemark/audit/notify/exec"
	"tidemark/audit/notify/jsonl"
	"tidemark/audit/notify/matrix"
	"tidemark/audit/notify/ntfy"
	"tidemark/audit/notify/shoutrrr"
	"tidemark/audit/notify/slack"
	"tidemark/audit/notify/smtp"
	"tidemark/audit/notify/syslog"
	"tidemark/audit/notify/teams"
	"tidemark/audit/notify/webhook"
	"tidemark/config"
)

// groupWait is how long a message waits for more, unless the configuration says.
const groupWait = 2 * time.Minute

// routesOf reads who is to be told of what. check is called with what is wrong.
func routesOf(c *config.Config, fail func(path, message string)) []notify.Route {
	var out []notify.Route
	for i, n := range c.Notify {
		wrong := func(key string, err error) { fail(fmt.Sprintf("notify[%d].%s", i, key), err.Error()) }
		r := notify.Route{
			Name: n.Name, MinSeverity: audit.Warning, ByRepository: n.GroupBy != config.GroupNone,
			Wait: groupWait, FlapWindow: time.Duration(c.Audit.FlapWindow),
		}
		var err error
		if n.Match != "" {
			if r.Match, err = audit.ParseGlob(n.Match); err != nil {
				wrong("match", err)
			} else if !r.Match.Possible() {
				wrong("match", fmt.Errorf("%q stands for no tag", n.Match))
			}
		}
		for _, name := range n.Events {
			if !audit.Type(name).Told() {
				wrong("events", fmt.Errorf("%q is no type of event", name))
			}
			if r.Types == nil {
				r.Types = make(map[audit.Type]bool)
			}
			r.Types[audit.Type(name)] = true
		}
		if n.MinSeverity != "" {
			var ok bool
			if r.MinSeverity, ok = audit.ParseSeverity(n.MinSeverity); !ok {
				wrong("min_severity", fmt.Errorf("%q is not one of info, notice, warning, high, critical", n.MinSeverity))
			}
		}
		if n.GroupWait != nil {
			r.Wait, r.FlapWindow = time.Duration(*n.GroupWait), 0
		}
		if n.Digest != "" {
			at, err := notify.ParseTimeOfDay(n.Digest)
			if err != nil {
				wrong("digest", err)
			}
			r.Digest = &at
		}
		if n.Quiet != "" {
			if r.Quiet, err = notify.ParseHours(n.Quiet); err != nil {
				wrong("quiet", err)
			}
		}
		if r.Templates, err = notify.ParseTemplates(n.Title, n.Text); err != nil {
			wrong("text", err)
		}
		r.Remind = time.Duration(n.Remind)
		if r.Sink, err = sinkOf(n); err != nil {
			wrong("type", err)
		}
		out = append(out, r)
	}
	return out
}

func sinkOf(n config.Notify) (notify.Sink, error) {
	switch n.Type {
	case config.NotifyWebhook:
		return webhook.New(string(n.URL), n.Format, string(n.Secret))
	case config.NotifySlack:
		return slack.New(string(n.URL))
	case config.NotifyTeams:
		return teams.New(string(n.URL))
	case config.NotifyDiscord:
		return discord.New(string(n.URL))
	case config.NotifyNtfy:
		return ntfy.New(string(n.URL), string(n.Secret))
	case config.NotifyMatrix:
		return matrix.New(string(n.URL), n.Room, string(n.Secret))
	case config.NotifyAlertmanager:
		return alertmanager.New(string(n.URL))
	case config.NotifySMTP:
		return smtp.New(string(n.URL), n.From, n.To, n.Username, string(n.Secret))
	case config.NotifySyslog:
		return syslog.New(string(n.URL), n.Format)
	case config.NotifyFile:
		return jsonl.New(n.Path), nil
	case config.NotifyStdout:
		return jsonl.To(os.Stdout), nil
	case config.NotifyShoutrrr:
		return shoutrrr.New(string(n.URL))
	case config.NotifyExec:
		return exec.New(n.Command)
	}
	return nil, fmt.Errorf("%q is no type of sink", n.Type)
}

// wireNotify makes who tells others.
func (s *server) wireNotify(ctx context.Context) error {
	var wrong error
	routes := routesOf(s.cfg, func(path, message string) { wrong = errors.Join(wrong, fmt.Errorf("%s: %s", path, message)) })
	mutes, err := s.store.Mutes(ctx, time.Now())
	if err != nil {
		return err
	}
	s.notifier = notify.New(notify.Options{
		Outbox: s.store, Routes: routes, Origin: s.origin, Log: s.log,
		Undelivered: func(ctx context.Context, u audit.Undelivered) error { return s.ledger.Undelivered(ctx, u) },
		Clients:     s.clients,
	})
	s.notifier.Mute(mutes)
	return wrong
}

// clients is how many clients had a digest, as far as it is kept.
func (s *server) clients(ctx context.Context, d digest.Digest) (int, error) {
	list, err := s.store.Exposures(ctx, d)
	return audit.CountExposed(list).Clients, err
}

// remute takes over what is muted, when that changed.
func (s *server) remute(e audit.Event) {
	if e.Operator == nil || e.Operator.Action != audit.MuteAction && e.Operator.Action != audit.Unmute {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	mutes, err := s.store.Mutes(ctx, time.Now())
	if err != nil {
		s.log.Warn().Err(err).Msg("what is muted could not be read: what was muted before is")
		return
	}
	s.notifier.Mute(mutes)
}

// describe says what an entry of the log is about, as messages do.
func (s *server) describe(index int64, leaf []byte, e audit.Event) (title, text string) {
	m := notify.Message{Origin: s.origin, Items: []notify.Item{{Index: index, Leaf: leaf, Event: e, Clients: -1}}}
	return m.Title(), m.Text()
}
