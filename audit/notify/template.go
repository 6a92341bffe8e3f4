package notify

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/template"
	"time"

	"github.com/opencontainers/go-digest"
)

// Templates are what an operator wants messages to say (text/template). A zero Templates
// says what is built in.
type Templates struct{ title, text *template.Template }

// templateMost bounds in bytes what a template may write.
const templateMost = 64 << 10

// functions are what templates can call besides those that are built in; none of them
// reaches anything.
var functions = template.FuncMap{
	"short": func(d digest.Digest) string { return short(d) },
	"join":  func(sep string, list []string) string { return strings.Join(list, sep) },
	"upper": strings.ToUpper, "lower": strings.ToLower,
	"clip": func(most int, s string) string { return Clip(s, most) },
	"time": func(layout string, t time.Time) string { return t.Format(layout) },
}

// ParseTemplates reads templates, "" for what is built in, and tries them on every
// sample: what does not work there would not in an alarm.
func ParseTemplates(title, text string) (t Templates, err error) {
	if t.title, err = parseTemplate("title", title); err != nil {
		return t, err
	}
	if t.text, err = parseTemplate("text", text); err != nil {
		return t, err
	}
	for name, events := range samples {
		m, err := sampleMessage(events(time.Now().UTC()))
		if err != nil {
			return t, err
		}
		if _, err := t.apply(m); err != nil {
			return t, fmt.Errorf("on the sample %s: %w", name, err)
		}
	}
	return t, nil
}

func parseTemplate(name, text string) (*template.Template, error) {
	if text == "" {
		return nil, nil
	}
	return template.New(name).Funcs(functions).Option("missingkey=error").Parse(text)
}

// A view is a message as templates see it.
type view struct {
	Title, Text, Severity string // as they are built in
	Digest, Test          bool
	Reminder              int
	Items                 []itemView
}

type itemView struct {
	Headline, Text, Severity string
	Index                    int64
	Clients                  int
	Type, Ref                string
	Upstream, Repository     string
	Tag                      string
	Old, New, Served         digest.Digest
	Class, Reason, Rule      string
	Mode                     string
	Signals, Tags            []string
	Time                     time.Time
	Until                    *time.Time
}

func viewOf(m Message) view {
	v := view{Title: m.builtinTitle(), Text: m.builtinText(), Severity: m.Severity().String(), Digest: m.Digest, Test: m.Test, Reminder: m.Reminder}
	for _, i := range m.Items {
		e := i.Event
		var full strings.Builder
		i.write(&full)
		iv := itemView{
			Headline: i.headline(), Text: strings.TrimRight(full.String(), "\n"), Severity: e.Severity().String(), Index: i.Index, Clients: i.Clients,
			Type: string(e.Type), Upstream: e.Ref.Upstream, Repository: e.Ref.Repository, Tag: e.Ref.Tag, Served: e.Policy.Served,
			Class: string(e.Class), Reason: e.Reason, Rule: e.Policy.Rule, Mode: string(e.Policy.Mode), Signals: e.Signals, Tags: e.Tags, Time: e.Time, Until: e.Policy.Until,
		}
		if e.Ref.Tag != "" {
			iv.Ref = e.Ref.String()
		}
		if e.Old != nil {
			iv.Old = e.Old.Digest
		}
		if e.New != nil {
			iv.New = e.New.Digest
		}
		v.Items = append(v.Items, iv)
	}
	return v
}

// apply has a message say what the templates make of it.
func (t Templates) apply(m Message) (Message, error) {
	out := m
	if t == (Templates{}) {
		return out, nil
	}
	v := viewOf(m)
	for _, part := range []struct {
		tmpl *template.Template
		to   *string
	}{{t.title, &out.title}, {t.text, &out.text}} {
		if part.tmpl == nil {
			continue
		}
		var b bytes.Buffer
		if err := part.tmpl.Execute(&bounded{&b, templateMost}, v); err != nil {
			return m, err
		}
		*part.to = strings.TrimSpace(b.String())
	}
	out.title = strings.Join(strings.Fields(out.title), " ") // it becomes heads of requests and mail
	return out, nil
}

// bounded refuses to take more than some bytes.
type bounded struct {
	w    io.Writer
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		return 0, errors.New("it writes more than 64 KiB")
	}
	return b.w.Write(p)
}
