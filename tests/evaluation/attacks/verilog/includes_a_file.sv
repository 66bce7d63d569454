`include "/etc/passwd"
assign q = 0;
endmodule
