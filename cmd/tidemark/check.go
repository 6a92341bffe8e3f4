package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newCheck() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:   "check",
		Short: "Validate a configuration and print what it means",
		Long: `Validate a configuration: every error at once, with its path, line and excerpt.
Then print the effective configuration, with every default and secrets masked.
Nothing is dialled and nothing is written.`,
		Example: "  tidemark check -c /etc/tidemark.yaml",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path, nil)
			if err != nil {
				return err
			}
			fmt.Fprint(c.OutOrStdout(), cfg)
			return nil
		},
	}
	c.Flags().StringVarP(&path, "config", "c", "", "configuration file; without one, the defaults are shown")
	return c
}
