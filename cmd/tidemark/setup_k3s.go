package main

import (
	"fmt"
	"slices"

	"github.com/goccy/go-yaml/ast"
	"github.com/spf13/cobra"
)

// Where k3s' configuration is.
const (
	k3sRegistries = "/etc/rancher/k3s/registries.yaml"
	k3sDropIn     = "/etc/rancher/k3s/config.yaml.d/50-tidemark.yaml"
	k3sCA         = "/etc/rancher/k3s/tidemark-ca.crt"
)

func newSetupK3s() *cobra.Command {
	f := &setupFlags{}
	c := addSetup(&cobra.Command{
		Use:   "k3s",
		Short: "Point k3s at this server, for every upstream",
		Long: `Print or write what belongs into k3s' registries.yaml, of which k3s makes the
configuration of its containerd: this server is asked first, and the registry itself
when this server does not answer or does not have it. With --no-fallback nothing but
this server is asked.`,
		Example: `  tidemark setup k3s
  tidemark setup k3s -c tidemark.yaml --no-fallback --write`,
	}, f, planK3s)
	addNoFallback(c, f, "have k3s ask nothing but this server, for all registries in registries.yaml")
	addForce(c, f)
	return c
}

func planK3s(s *site, f *setupFlags) (*plan, error) {
	p := &plan{steps: []string{"systemctl restart k3s          # on servers", "systemctl restart k3s-agent    # on agents"}}
	wants := make([]yamlWant, 0, len(s.upstreams)+1)
	if s.ca != nil {
		p.files = append(p.files, file{
			path: k3sCA, mode: 0o644, edit: replaceCA(s.ca),
			intro: fmt.Sprintf("Copy the CA of this server to %s. It is %s.", k3sCA, s.ca.source()),
		})
		wants = append(wants, yamlWant{[]string{"configs", s.registry.Host, "tls", "ca_file"}, k3sCA, false})
	}
	for _, name := range s.upstreams {
		wants = append(wants, yamlWant{[]string{"mirrors", name, "endpoint"}, s.registry.String(), true})
	}
	text, err := editRegistriesYAML(nil, wants)
	if err != nil {
		panic("setup: k3s: " + err.Error()) // there is nothing in its way
	}
	p.files = append(p.files, file{
		path: k3sRegistries, mode: 0o600, text: string(text), // others write passwords into it
		intro: fmt.Sprintf("Put this into %s, beside what is there:", k3sRegistries),
		edit:  func(old []byte) ([]byte, error) { return editRegistriesYAML(old, wants) },
	})
	p.notes = append(p.notes, "Every node reads its own file, when it starts. Running pods go on while k3s restarts.")
	if f.noFallback {
		text := written + "disable-default-registry-endpoint: true\n"
		p.files = append(p.files, file{
			path: k3sDropIn, mode: 0o644, edit: owned(text, f.force), text: text,
			intro: fmt.Sprintf("Write %s, which k3s knows since January 2024 (1.26.13, 1.27.10, 1.28.6, 1.29.1):", k3sDropIn),
		})
		p.notes = append(p.notes, "Nothing but what registries.yaml names is asked, for all registries that it names: when this server is down, pulls fail.")
	} else {
		p.notes = append(p.notes, "When this server does not answer, or answers with an error, k3s' containerd goes to the registry itself. --no-fallback closes that way.")
	}
	p.notes = append(p.notes, s.notes(fmt.Sprintf("k3s takes them from configs.%q.auth in registries.yaml (username, password).", s.registry.Host))...)
	return p, nil
}

// editRegistriesYAML returns registries.yaml with what is wanted added to it.
func editRegistriesYAML(old []byte, wants []yamlWant) ([]byte, error) {
	if err := k3sInTheWay(old, wants); err != nil {
		return nil, err
	}
	for _, w := range wants {
		if _, err := addYAML(old, w); err != nil { // with the lines as they are in the file
			return nil, err
		}
	}
	doc := old
	for _, w := range slices.Backward(wants) { // each is put before the one after it
		var err error
		if doc, err = addYAML(doc, w); err != nil {
			return nil, err
		}
	}
	return doc, nil
}

// k3sInTheWay finds what would change what was wanted, or be changed by it,
// although it stands elsewhere.
func k3sInTheWay(doc []byte, wants []yamlWant) error {
	root, err := parseYAML(doc)
	if err != nil {
		return err
	}
	all := findYAML(root, "mirrors", "*", "endpoint")
	if list, ok := all.(*ast.SequenceNode); ok && len(list.Values) > 0 {
		return fmt.Errorf(`line %d: mirrors has endpoints for "*", which do not count for a registry that is named, and each upstream would be: take them out`, yamlLine(all))
	}
	for _, w := range wants {
		if rewrite := findYAML(root, w.path[0], w.path[1], "rewrite"); rewrite != nil {
			return fmt.Errorf("line %d: there is a rewrite for %s, which would change what this server is asked for: take it out, or leave this upstream out (--upstream)", yamlLine(rewrite), w.path[1])
		}
	}
	return nil
}
