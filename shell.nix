# On NixOS: nix-shell, then make setup. The wheels of Python packages load libstdc++ from here.
{ pkgs ? import <nixpkgs> { } }:
pkgs.mkShell {
  packages = with pkgs; [ python3 uv gnumake openssl git kubectl k3d ];
  LD_LIBRARY_PATH = pkgs.lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib ];
}
